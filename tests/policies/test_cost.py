"""What policies launch: few operators per packed layer, and nothing a step of decoding has to wait for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from alula.policies import Budget, Policy, Prune, Skip, Withdraw
from alula.seam import install
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.elsewhere import DEVICE, elsewhere
from tests.grafts.common import token_map
from tests.grafts.experts.test_cost import forwards

LAYERS = 8
MOST = 12  # operators beyond the host's own, of each packed layer

# a policy, and the same with two more packed layers
PAIRS: dict[str, tuple[Policy, Policy]] = {
    "withdraw": (Withdraw(layer=4), Withdraw(layer=2)),
    "withdraw, dense": (Withdraw(layer=4, positions="dense"), Withdraw(layer=2, positions="dense")),
    "prune": (Prune(stages=[(4, 0.5)]), Prune(stages=[(2, 0.5)])),
    "budget": (Budget(image_tokens=2, layer=4), Budget(image_tokens=2, layer=2)),
    "skip mlp": (Skip(part="mlp", layers=(2, 4)), Skip(part="mlp", layers=(2, 4, 5, 6))),
    "skip attention": (Skip(part="attention", layers=(2, 4)), Skip(part="attention", layers=(2, 4, 5, 6))),
    "skip steps": (
        Skip(part="block", layers=(2, 4), tokens="all", when="steps"),
        Skip(part="block", layers=(2, 4, 5, 6), tokens="all", when="steps"),
    ),
    "skip block, lent keys": (
        Skip(part="block", layers=(2, 4), keys="lent"),
        Skip(part="block", layers=(2, 4, 6), keys="lent"),
    ),
    "skip block, own keys": (
        Skip(part="block", layers=(2, 4), keys="own"),
        Skip(part="block", layers=(2, 4, 5, 6), keys="own"),
    ),
}
OTHERS: tuple[Any, ...] = (
    "instruction_attention",
    {"name": "last_query_attention", "of_layer": "itself"},
    {"name": "rope_free_attention", "stride": None},
    "max_min_diversity",
    "conditional_dpp",
    "duplicates",
    "random",
    "grid",
)
PAIRS |= {
    by if isinstance(by, str) else f"{by['name']}, {by.get('of_layer')}": (
        Prune.model_validate({"stages": ((4, 0.5),), "criterion": by}),
        Prune.model_validate({"stages": ((2, 0.5),), "criterion": by}),
    )
    for by in OTHERS
}
PAIRS |= {
    "dense": (
        Prune.model_validate({"stages": ((4, 0.5),), "positions": "dense"}),
        Prune.model_validate({"stages": ((2, 0.5),), "positions": "dense"}),
    ),
    "merged": (
        Prune.model_validate({"stages": ((4, 0.5),), "merge": "contextual"}),
        Prune.model_validate({"stages": ((2, 0.5),), "merge": "contextual"}),
    ),
}
LAYOUTS = (("3I2I2",), ("3I2", "9", "I4I2"))


def measured(policy: Policy | None, layouts: tuple[str, ...]) -> list[tuple[int, int]]:
    """Of a prompt and of a step: operators launched, and reads by the host."""
    model = zoo.build("llama", layers=LAYERS)
    install(model, "somebody")
    with nullcontext() if policy is None else policy.on(model):
        return [(launched.total(), reads) for launched, reads in forwards(model, *layouts)]


@pytest.mark.parametrize("layouts", LAYOUTS, ids=["one", "ragged"])
@pytest.mark.parametrize("case", PAIRS)
def test_packed_layers_launch_little_and_steps_do_not_wait(case: str, layouts: tuple[str, ...]) -> None:
    bare, few, more = (measured(policy, layouts) for policy in (None, *PAIRS[case]))
    (_, bare_reads), (prompt, reads), (longer, other_reads) = bare[0], few[0], more[0]
    assert longer - prompt <= 2 * MOST
    assert reads == other_reads  # the host reads which tokens are left once, however many layers these are left in
    assert reads - bare_reads <= 4
    assert few[1][1] == more[1][1] == bare[1][1]
    assert more[1][0] - few[1][0] <= 2 * MOST


@pytest.mark.parametrize("case", PAIRS)
def test_everything_stays_on_the_models_device(case: str) -> None:
    policy = PAIRS[case][1]
    inputs = zoo.batch("llama", *LAYOUTS[1])
    length = inputs["input_ids"].shape[1]
    embeds = torch.randn(3, length, 32, generator=torch.Generator().manual_seed(0))

    def said(device: str) -> torch.Tensor:
        model = zoo.build("llama", layers=LAYERS).to(device)
        mask = inputs["attention_mask"].to(device)
        with policy.on(model), torch.no_grad():
            given = {"inputs_embeds": embeds.to(device), "token_map": token_map(inputs).to(device)}
            output = model(**given, attention_mask=mask, use_cache=True)
            more = torch.full((3, 1), 5, device=device)
            mask = torch.cat([mask, torch.ones_like(more)], dim=1)
            step = model(input_ids=more, attention_mask=mask, **{cache_keyword(): cache_of_output(output)})
        return torch.cat([output.logits, step.logits], dim=1)

    expected = said("cpu")
    with elsewhere():
        ours = said(DEVICE)
        assert ours.device.type == DEVICE
        ours = ours.to("cpu")
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
