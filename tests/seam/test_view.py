"""Image tokens taken out of the later layers by plain hooks: what is said of them stays right, or is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alula
from alula import WingsConfig
from alula.errors import HostError, SeamError
from alula.probes import AttentionShift
from alula.probes.attention import SEGMENTS
from alula.seam import Phase, Point, install, taps
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import CONFIGS, wake

HOST, LAYERS, FIRST = "llava-llama", 4, 2
CACHE = cache_keyword()
NEXT = [5, 7]


def deep() -> Any:
    """A host of more layers than those of the zoo."""
    shallow = zoo.build(HOST)
    config = copy.deepcopy(shallow.config)
    config.text_config.num_hidden_layers = LAYERS
    model: Any = type(shallow)(config).eval()
    weights = shallow.state_dict()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            there = re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{int(match[1]) % 2}.", name)
            weight.copy_(weights[there])
    return model


class Withdraw:
    """Plain hooks that take image tokens out of layers FIRST and later, as a stock host can be used without alula."""

    def __init__(self, model: Any, ids: Tensor, left: Tensor | None = None) -> None:
        left = ids != zoo.IMAGE if left is None else left
        self.keep = left.nonzero()[:, 1].view(len(ids), -1)
        self.handles = [
            layer.register_forward_pre_hook(self.take, with_kwargs=True)
            for layer in model.model.language_model.layers[FIRST:]
        ]

    def take(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        if cos.shape[1] == 1 or cos.shape[1] <= self.keep.max():
            return None
        tables = tuple(self.pick(table.expand(len(self.keep), -1, -1)) for table in (cos, sin))
        hidden = hidden if hidden.shape[1] == self.keep.shape[1] else self.pick(hidden)
        given = {**kwargs, "position_embeddings": tables, "position_ids": None, "attention_mask": None}
        return ((hidden, *args[1:]), given) if args else (args, {**given, "hidden_states": hidden})

    def pick(self, x: Tensor) -> Tensor:
        return x.gather(1, self.keep[..., None].expand(-1, -1, x.shape[-1]))


def blinded(model: Any, ids: Tensor) -> Any:
    """The oracle: all tokens stay in all layers, and nobody attends to image tokens in the later ones."""
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & (ids != zoo.IMAGE)[:, None]
    allowed |= torch.eye(length, dtype=torch.bool)

    def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": allowed[:, None]}

    for layer in model.model.language_model.layers[FIRST:]:
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def batch() -> dict[str, Tensor]:
    return zoo.batch(HOST, "3I4", "2I5")


@torch.no_grad()
def steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, tokens, V) logits of the prompt's text tokens and of two further tokens, one by one behind its cache."""
    output = model(**inputs, use_cache=True)
    found = [output.logits]
    for token in NEXT:
        output = model(input_ids=torch.full((2, 1), token), **{CACHE: cache_of_output(output)}, use_cache=True)
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("graft_first", [True, False])
@pytest.mark.parametrize("config", ["mass", "attention", "constant", "paper", "normalized", "keys kept", "last layer"])
def test_wings_equal_the_masked_oracle(config: str, graft_first: bool) -> None:
    if config == "last layer" and graft_first:
        pytest.skip("refused, see below")
    inputs = batch()
    oracle, model = deep(), deep()
    wake(alula.attach(oracle, CONFIGS[config]))
    if not graft_first:
        Withdraw(model, inputs["input_ids"])
    wake(alula.attach(model, CONFIGS[config]))
    if graft_first:
        Withdraw(model, inputs["input_ids"])
    ids = torch.cat([inputs["input_ids"], torch.tensor([NEXT, NEXT])], dim=1)
    with torch.no_grad():
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = (
            blinded(oracle, ids)(**whole, use_cache=False)
            .logits[ids != zoo.IMAGE]
            .view(2, -1, model.config.text_config.vocab_size)
        )
    torch.testing.assert_close(steps(model, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["reordered", "repeated", "selected", "cropped"])
def test_what_is_known_of_the_cache_follows_what_is_done_to_it(change: str) -> None:
    """As beams, several samples and drafts do; the next token then is as for a prompt of those samples."""
    inputs, model = batch(), deep()
    withdrawn = Withdraw(model, inputs["input_ids"])
    graft = wake(alula.attach(model, CONFIGS["mass"]))

    def following(output: Any, token: int, samples: int) -> Any:
        return model(input_ids=torch.full((samples, 1), token), **{CACHE: cache_of_output(output)}, use_cache=True)

    samples = {"reordered": [1, 0], "repeated": [0, 0, 1, 1], "selected": [1], "cropped": [0, 1]}[change]
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        expected = following(copy.deepcopy(output), 5, 2).logits[samples]
        cache = cache_of_output(output)
        if change == "reordered":
            cache.reorder_cache(torch.tensor(samples))
        elif change == "repeated":
            cache.batch_repeat_interleave(2)
        elif change == "selected":
            cache.batch_select_indices(torch.tensor(samples))
        else:
            following(output, 9, 2)
            cache.crop(-1)
        found = following(output, 5, len(samples)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert withdrawn.handles
    graft.detach()


@pytest.mark.parametrize("probe_first", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_shift_equals_the_hosts_own_weights(attention: str, probe_first: bool) -> None:
    inputs = batch()
    ids = inputs["input_ids"]
    model = deep()
    withdrawn = Withdraw(model, ids)
    zoo.set_attention(model, "eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    zoo.set_attention(model, attention)
    if probe_first:
        for handle in withdrawn.handles:
            handle.remove()
    probe = AttentionShift(heads="mean")
    with torch.no_grad(), probe.on(model):
        if probe_first:
            Withdraw(model, ids)
        model(**inputs)
    for layer, here in enumerate(weights):
        image = torch.zeros(2)
        for sample in range(2):
            left = ids[sample] if here.shape[-1] == ids.shape[1] else ids[sample][ids[sample] != zoo.IMAGE]
            image[sample] = here[sample].mean(dim=(0, 1))[left == zoo.IMAGE].sum()
        measured = probe.tally.sums["curve/main"][layer, 0] / 2
        assert measured.sum() == pytest.approx(1.0, abs=1e-5)
        assert float(measured[SEGMENTS.index("image")]) == pytest.approx(float(image.mean()), abs=1e-5)


def test_taps_say_which_tokens_they_saw() -> None:
    inputs, model = batch(), deep()
    Withdraw(model, inputs["input_ids"])
    seen: list[Any] = []
    with torch.no_grad(), taps(model, ["block_input", "attention", "mlp", "block_output"], seen.append):
        model(**inputs)
    for event in seen:
        assert event.hidden.shape[:2] == event.tokens.shape
        assert bool(event.tokens.is_perceptual.any()) is (event.layer < FIRST)
        view = event.forward.at(event.layer)
        assert torch.equal(view.pick(event.forward.tokens.position), event.tokens.position)


def test_a_graft_behind_layers_that_nobody_looks_at_is_refused() -> None:
    """Its layer is entered by what is left, before the hook behind it picks the positions."""
    inputs, model = batch(), deep()
    alula.attach(model, CONFIGS["last layer"])
    Withdraw(model, inputs["input_ids"])
    with torch.no_grad(), pytest.raises(SeamError, match="do not say which"):
        model(**inputs)


def test_tokens_that_cannot_be_told_apart_are_refused() -> None:
    inputs, model = batch(), deep()
    wake(alula.attach(model, WingsConfig(rank=2)))
    positions = torch.zeros_like(inputs["input_ids"])
    Withdraw(model, inputs["input_ids"])
    with torch.no_grad(), pytest.raises(SeamError, match="do not say which"):
        model(**inputs, position_ids=positions)


@pytest.mark.parametrize("graft_first", [True, False])
def test_whoever_takes_tokens_out_can_say_which_are_left(*, graft_first: bool) -> None:
    inputs, model, oracle = batch(), deep(), deep()
    ids = inputs["input_ids"]
    same_places = {"position_ids": torch.zeros_like(ids)}
    if graft_first:
        wake(alula.attach(model, CONFIGS["mass"]))
    withdrawn = Withdraw(model, ids)
    if not graft_first:
        wake(alula.attach(model, CONFIGS["mass"]))
    wake(alula.attach(oracle, CONFIGS["mass"]))
    seam = install(model, "withdrawal")
    for layer in range(FIRST, LAYERS):
        seam.on(Point.BLOCK_INPUT, layer, lambda view, hidden: withdrawn.keep, phase=Phase.TOKENS, owner="withdrawal")
    with torch.no_grad():
        expected = blinded(oracle, ids)(**inputs, **same_places, use_cache=False).logits
        logits = model(**inputs, **same_places).logits
    torch.testing.assert_close(logits, expected[ids != zoo.IMAGE].view_as(logits), atol=1e-4, rtol=1e-4)
    with pytest.raises(HostError, match="where a block begins"):
        seam.on(Point.MLP, 1, lambda view, hidden: None, phase=Phase.TOKENS, owner="withdrawal")
