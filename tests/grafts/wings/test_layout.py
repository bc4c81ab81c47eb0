"""How prefilling lays out queries: a rearrangement that loses nothing and makes each learner's keys neighbors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from alula import TokenMap, WingsConfig
from alula.grafts.wings.learners import MOST_SEGMENTS, keys_of
from alula.grafts.wings.prefill import KeyLayout, PrefillEngine, lay_out, parts_of
from alula.seam import NAME, ForwardContext, attention
from alula.tokens import KnownTokens, Modality, Role
from tests import zoo
from tests.grafts.common import grafted, run

TEXT, IMAGE, PADDING = int(Modality.TEXT), int(Modality.IMAGE), int(Modality.PADDING)


def tokens_of(*samples: str, side: str = "right") -> TokenMap:
    """A map of samples such as "ss..II." (system, text, image tokens), filled up on one side."""
    longest = max(map(len, samples))
    kinds, roles = [], []
    for sample in samples:
        blank = "-" * (longest - len(sample))
        letters = sample + blank if side == "right" else blank + sample
        kinds.append([{"I": IMAGE, "-": PADDING}.get(letter, TEXT) for letter in letters])
        roles.append([int(Role.SYSTEM if letter == "s" else Role.USER) for letter in letters])
    return TokenMap.from_modalities(torch.tensor(kinds), roles=torch.tensor(roles))


BATCHES = {
    "one": tokens_of("..III..."),
    "image first, adjacent to nothing": tokens_of("II.I"),
    "text alone": tokens_of("....", "..."),
    "alike, right padding": tokens_of("..II....", "..II..", "..II"),
    "alike, left padding": tokens_of("..II..", "..II.", side="left"),
    "ragged": tokens_of("..II..I.", "I.", ".....", "III"),
    "ragged, left": tokens_of("..II..I.", "I.", ".....", side="left"),
    "system tokens": tokens_of("ss.II..s.", "ss.II..s"),
    "ragged system tokens": tokens_of("ss.II..s.", "s.I"),
    "many runs": tokens_of("I." * MOST_SEGMENTS, "I." * MOST_SEGMENTS),
}


def layout_of(tokens: TokenMap, config: WingsConfig) -> KeyLayout:
    known = KnownTokens.read(tokens)
    has_roles = not config.system_keys and "textual" in config.learners
    return lay_out(tokens, known, config, parts_of(known, tokens.role.numpy() if has_roles else None))


@pytest.mark.parametrize("learners", [("visual", "textual"), ("visual",)])
@pytest.mark.parametrize("system_keys", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_every_token_has_its_place(name: str, system_keys: bool, learners: tuple[str, ...]) -> None:
    tokens, config = BATCHES[name], WingsConfig(system_keys=system_keys, learners=learners)
    layout = layout_of(tokens, config)
    table = torch.randn(*tokens.shape, 2, 3)
    again = layout.restore(layout.arrange(table))
    assert torch.equal(again[tokens.valid], table[tokens.valid])
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    index = layout.arrange(places)
    assert index.numpy().tolist() == layout.arranged(places.numpy()).tolist()
    assert torch.equal(layout.arrange(table), table[torch.arange(len(table))[:, None], index])
    assert sum(layout.sizes) == index.shape[1]
    for learner in learners:
        keys = keys_of(learner, tokens, config)
        part = layout.part(learner)
        for b in range(tokens.shape[0]):
            mine = keys[b].nonzero().flatten().tolist()
            assert index[b, part].tolist()[: len(mine)] == mine  # what fills up comes last


def test_moving_whole_segments_is_for_batches_laid_out_alike() -> None:
    whole = {name for name, tokens in BATCHES.items() if layout_of(tokens, WingsConfig()).segments is not None}
    assert whole == {
        "one",
        "image first, adjacent to nothing",
        "text alone",
        "alike, right padding",
        "system tokens",
    }


def plan_of(tokens: TokenMap) -> PrefillEngine:
    """What the layers of a Llama share in a forward over tokens of twice these kinds."""
    model, _ = grafted("llama", WingsConfig(rank=4))
    plans: list[PrefillEngine] = []

    def collect(layer: object, args: object, kwargs: dict[str, ForwardContext]) -> None:
        plans.extend(value for value in kwargs[NAME].memo.values() if isinstance(value, PrefillEngine))

    model.model.layers[-1].register_forward_pre_hook(collect, with_kwargs=True)
    kind = tokens.modality.repeat_interleave(2, dim=1)  # long enough not to be taken for few queries
    with torch.no_grad():
        model(input_ids=torch.randint(0, 50, kind.shape), token_map=TokenMap.from_modalities(kind))
    (plan,) = plans
    return plan


@pytest.mark.parametrize("name", ["ragged", "ragged, left", "alike, right padding", "alike, left padding"])
def test_padding_attends_to_nothing(name: str) -> None:
    padding = (BATCHES[name].modality < 0).repeat_interleave(2, dim=1)
    inactive = plan_of(BATCHES[name]).inactive
    assert inactive.shape == (*padding.shape, 2)
    assert inactive[padding].all()
    assert not inactive.all()


@pytest.mark.parametrize("name", ["one", "image first, adjacent to nothing", "alike, right padding", "system tokens"])
def test_prompts_laid_out_alike_need_no_mask(name: str) -> None:
    """Also with several images and padding: every block is causal, or lets all its queries see the same keys."""
    tokens = BATCHES[name]
    plan = plan_of(tokens)
    assert plan.keys.keys() == {"visual", "textual"}
    for keys in plan.keys.values():
        assert sum(block.is_causal for block in keys.blocks) == 1
        assert all(block.is_causal or block.min_keys == block.max_keys for block in keys.blocks)


def test_segments_are_cut_where_neighbors_part() -> None:
    layout = layout_of(tokens_of("..II...I."), WingsConfig())
    assert layout.sizes == (6, 3, 0)
    assert layout.cuts == (2, 5, 6, 8)
    index = layout.arrange(torch.arange(9)[None])
    assert [index[0, a:b].tolist() for a, b in itertools.pairwise((0, *layout.cuts, 9))] == [
        [0, 1],
        [4, 5, 6],
        [8],
        [2, 3],
        [7],
    ]


def test_what_stands_in_padding_does_not_matter() -> None:
    """Not even numbers so large that what a learner makes of them is no number any more."""
    model, _ = grafted("llama", WingsConfig(rank=4))
    kind = tokens_of("..II........", "..II..").modality
    embedded = torch.randn(*kind.shape, 32)
    logits = []
    for value in (0.0, 1e30):
        inputs = torch.where((kind < 0)[..., None], value, embedded)
        with torch.no_grad():
            logits.append(
                model(
                    inputs_embeds=inputs, attention_mask=(kind >= 0).long(), token_map=TokenMap.from_modalities(kind)
                ).logits
            )
    torch.testing.assert_close(logits[0][kind >= 0], logits[1][kind >= 0], atol=1e-5, rtol=1e-5)


class Masks(TorchFunctionMode):
    """Collects the boolean masks that attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mask = (kwargs or {}).get("attn_mask")
        if function is torch.nn.functional.scaled_dot_product_attention and mask is not None:
            self.found.append(mask)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_query_of_a_mask_has_a_key(side: str) -> None:
    """Also padding and queries whose learner has no key for them: kernels differ in what they make of others."""
    model, _ = grafted("llama", WingsConfig(rank=4))
    kind = tokens_of("..II..I.", "..I..", "III", side=side).modality.repeat_interleave(4, dim=1)
    mask = (kind >= 0).to(torch.int64)
    with Masks() as masks:
        model(
            input_ids=torch.randint(0, 50, kind.shape),
            attention_mask=mask,
            token_map=TokenMap.from_modalities(kind, mask),
        )
    assert len(masks.found) >= 2 * model.config.num_hidden_layers  # the decoder's own and learners'
    assert all(found.dtype == torch.bool and found.any(dim=-1).all() for found in masks.found)


class Widths(TorchFunctionMode):
    """Collects how wide the keys and values are that attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, int]] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            _, key, value = args
            self.found.add((key.shape[-1], value.shape[-1]))
        return function(*args, **(kwargs or {}))


def test_values_wider_than_keys_go_as_they_are_where_a_kernel_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are those of recent accelerators; here the question is answered for them. Elsewhere keys are filled up."""
    model, _ = grafted("llama", "mass")
    inputs, found = zoo.batch("llama", "3I20", "9I31"), []
    for takes in (False, True):
        monkeypatch.setattr(attention, "_takes_wide_values", lambda query, takes=takes: takes)
        with Widths() as widths:
            logits = run(model, "llama", inputs)
        found.append((logits[inputs["attention_mask"].bool()], widths.found))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert all(key == value for key, value in found[0][1])
    assert any(key < value for key, value in found[1][1])


def test_roles_are_nothing_to_the_visual_learner() -> None:
    """Also where samples differ in where their images stand, and their tokens are laid out one by one."""
    inputs = zoo.batch("llava-llama", "2I9I3", "1I2")
    roles = torch.full(inputs["input_ids"].shape, int(Role.USER))
    roles[:, :6] = roles[:, -2:] = int(Role.SYSTEM)
    logits = []
    for system_keys in (True, False):
        model, _ = grafted("llava-llama", WingsConfig(rank=4, learners=("visual",), system_keys=system_keys))
        with torch.no_grad():
            logits.append(model(**inputs, token_roles=roles).logits[inputs["attention_mask"].bool()])
    assert torch.equal(*logits)
