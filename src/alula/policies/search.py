"""Choosing layers on one's own data: where to withdraw images (VTW), and in which layers to freeze them (ShortV).

Nothing is computed twice that has to be computed once. One pass over a prompt notes what enters each layer; a
candidate layer then goes on from there, so that withdrawal costs a triangle of the layers above, on text alone, instead
of a whole pass per candidate. Media are not read again either.

Shapes: S tokens of a prompt and its answer, T of the answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.policies.base import Policy, Stand, asked
from alula.policies.skip import Skip
from alula.policies.withdraw import Withdraw
from alula.seam import (
    READING,
    LayerView,
    Owner,
    Phase,
    Point,
    Work,
    evaluating,
    find,
    generation_extras,
    marked,
    scoring_inputs,
)
from alula.tokens import TokenMap

Prompt = Mapping[str, Any]
"""what the model is given for one prompt, as a processor makes it; text decoders are told by ``token_map``"""


@dataclass(frozen=True)
class WithdrawalSearch:
    """What withdrawal at each layer does to a model's own greedy answers.

    Attributes:
        layers: the candidates, ascending.
        divergences: per prompt and layer, KL(withdrawn || full) of the next token behind the prompt, in nats.
        agreed: per prompt and layer, how many tokens of the full model's answer would be said before another one is.
        lengths: per prompt, the tokens of that answer.
        positions: of text in the layers without images, see `Withdraw`.
    """

    layers: tuple[int, ...]
    divergences: tuple[tuple[float, ...], ...]
    agreed: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    positions: Literal["keep", "dense"] = "keep"

    def divergence(self) -> dict[int, float]:
        """The mean divergence by layer."""
        return _means(self.layers, self.divergences)

    def agreement(self) -> dict[int, float]:
        """The share of prompts whose whole answer stays token for token, by layer."""
        whole = [[agreed == length for agreed in of] for of, length in zip(self.agreed, self.lengths, strict=True)]
        return _means(self.layers, whole)

    def by_divergence(self, limit: float) -> Withdraw:
        """VTW's choice: the first layer whose mean divergence is at most `limit` (0.003 for its LLaVA-1.5-7B).

        What the first token shows says little of whole answers, each of whose tokens is blind above the layer: see
        `by_agreement`.

        Raises:
            UsageError: there is none.
        """
        found = self.divergence()
        return self._first({layer: value <= limit for layer, value in found.items()}, min(found.values()), limit)

    def by_agreement(self, share: float) -> Withdraw:
        """The first layer at which at least that share of whole answers stays token for token.

        Raises:
            UsageError: there is none.
        """
        found = self.agreement()
        return self._first({layer: value >= share for layer, value in found.items()}, max(found.values()), share)

    def _first(self, fits: Mapping[int, bool], best: float, wanted: float) -> Withdraw:
        layer = next((layer for layer, fit in fits.items() if fit), None)
        if layer is None:
            raise UsageError(
                f"none of the layers {self.layers[0]} to {self.layers[-1]} will do: the best has {best:.4g}, and "
                f"{wanted:.4g} is asked for",
                remedy="ask for less, or do without withdrawal on this data",
            )
        return Withdraw(layer=layer, positions=self.positions)


@dataclass(frozen=True)
class Contributions:
    """What each layer does for image tokens (ShortV's layer contribution, arXiv 2504.00502): little where it may go.

    Attributes:
        layers: the candidates, ascending.
        scores: per prompt and layer, KL(skipping || full) of the next token behind the prompt, in nats, where image
            tokens skip that layer alone.
        part, keys: what was skipped, and what was left of it, see `Skip`.
    """

    layers: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    part: Literal["mlp", "attention", "block"]
    keys: Literal["absent", "own"]

    def mean(self) -> dict[int, float]:
        """The mean score by layer."""
        return _means(self.layers, self.scores)

    def ranked(self) -> list[int]:
        """The layers, those that contribute least first.

        With keys of their own in it, the last layer scores 0 in exact arithmetic (nothing behind it looks at image
        tokens), and is always the first.
        """
        found = self.mean()
        return sorted(found, key=lambda layer: found[layer])

    def skip(self, count: int) -> Skip:
        """Image tokens skip the `count` layers that contribute least.

        Raises:
            UsageError: there are not as many.
        """
        if not 0 < count <= len(self.layers):
            raise UsageError(f"{count} of {len(self.layers)} layers", remedy=f"give 1 to {len(self.layers)}")
        return Skip(part=self.part, layers=tuple(sorted(self.ranked()[:count])), keys=self.keys)


def search_withdrawal(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    layers: Sequence[int] | None = None,
    positions: Literal["keep", "dense"] = "keep",
    max_new_tokens: int = 32,
) -> WithdrawalSearch:
    """Find out at which layers image tokens may leave a decoder, by the model's own greedy answers.

    Whether a token of an answer stays is read behind the answer's own tokens before it: greedy generation under the
    policy says the same tokens up to there. Answers are without penalties, whatever the model's settings.

    Args:
        model: a host, with or without grafts, PEFT adapters and policies that are on it for good.
        prompts: of the user's own data, one prompt with media each, of batch size 1 and without padding; VTW took 20
            of the task.
        layers: candidates of `Withdraw`; all by default.
        positions: as `Withdraw` has them.
        max_new_tokens: most tokens of an answer; 1: VTW's own search, by the first token alone.

    Raises:
        UsageError: a prompt that is none, no prompts, or layers that the decoder does not have.
    """
    anatomy = Anatomy.of(model)
    chosen = tuple(sorted(set(range(1, anatomy.num_layers) if layers is None else layers)))
    if not chosen or max_new_tokens < 1:
        raise UsageError("there is nothing to find out", remedy="name layers, and one token of an answer at least")
    policies = {layer: Withdraw(layer=layer, positions=positions) for layer in chosen}
    for policy in policies.values():
        policy.check(anatomy)
    divergences, agreed, lengths = [], [], []
    for prompt in _checked(prompts):
        read, answer = (prompt, None) if max_new_tokens == 1 else _answered(model, prompt, max_new_tokens)
        count = 1 if answer is None else len(answer)
        tape = _Tape(model, read, count, chosen, text_alone=True)
        said = tape.logits.argmax(dim=-1) if answer is None else answer.to(tape.logits.device)
        here, same = [], []
        for layer in chosen:
            logits = tape.resumed(layer, policies[layer])
            here.append(_divergence(logits[0], tape.logits[0]))
            differs = (logits.argmax(dim=-1) != said).nonzero()
            same.append(int(differs[0]) if len(differs) else count)
        divergences.append(tuple(here))
        agreed.append(tuple(same))
        lengths.append(count)
    return WithdrawalSearch(chosen, tuple(divergences), tuple(agreed), tuple(lengths), positions)


def layer_contributions(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    part: Literal["mlp", "attention", "block"] = "block",
    keys: Literal["absent", "own"] | None = None,
    layers: Sequence[int] | None = None,
) -> Contributions:
    """Find out which layers do little for image tokens: ShortV's score, and the same of an MLP or attention alone.

    Args:
        model: a host, with or without grafts, PEFT adapters and policies that are on it for good.
        prompts: of the user's own data, one prompt with media each, of batch size 1 and without padding.
        part, keys: what image tokens skip, see `Skip`; by default blocks with own keys, as ShortV's frozen layers.
        layers: candidates; all by default.

    Raises:
        UsageError: a prompt that is none, no prompts, or layers that the decoder does not have.
    """
    anatomy = Anatomy.of(model)
    chosen = tuple(sorted(set(anatomy.layer_indices(layers))))
    kept = keys or ("absent" if part == "mlp" else "own")
    policies = {layer: Skip(part=part, layers=(layer,), keys=kept) for layer in chosen}
    scores = []
    for prompt in _checked(prompts):
        tape = _Tape(model, prompt, 1, chosen, text_alone=False)
        scores.append(tuple(_divergence(tape.resumed(i, policies[i])[0], tape.logits[0]) for i in chosen))
    return Contributions(chosen, tuple(scores), part, kept)


def _means(layers: Sequence[int], values: Sequence[Sequence[float]]) -> dict[int, float]:
    """By layer the mean over prompts, of values per prompt and layer."""
    return {layer: sum(of[i] for of in values) / len(values) for i, layer in enumerate(layers)}


class _Tape:
    """A prompt read once: the logits of its last tokens, and what entered each layer, to go on from there.

    Attributes:
        logits: (T, V), in double precision.
    """

    def __init__(
        self, model: nn.Module, prompt: Prompt, count: int, layers: Sequence[int], *, text_alone: bool
    ) -> None:
        """
        Args:
            count: T.
            layers: those to go on from.
            text_alone: what enters is kept of text alone.
        """
        self.model, self.count, self.text_alone = model, count, text_alone
        self.entered: dict[int, Tensor] = {}
        self.first: Tensor | None = None
        self.tokens: TokenMap | None = None
        self._left: Tensor | None = None
        self._adds_between = False  # features of images to the stream, between layers (DeepStack)
        wanted = set(layers)
        self._barred = getattr(getattr(model, "generation_config", None), "suppress_tokens", None) or []

        def place(stand: Stand) -> None:
            for layer in range(stand.anatomy.num_layers):
                stand.at(Point.BLOCK_INPUT, layer, self._compare, phase=Phase.READ)
                if layer in wanted:
                    stand.at(Point.BLOCK_INPUT, layer, self._note, phase=Phase.READ)
                stand.at(Point.BLOCK_OUTPUT, layer, self._leave, phase=Phase.READ)

        self.logits = self._run(place, prompt)
        self._left = None
        assert self.tokens is not None
        if not bool(self.tokens.is_perceptual.any()):
            raise UsageError(
                "a prompt has no image, video or sound: nothing can be found out by it",
                remedy="give prompts with media; a text decoder is told by token_map= which of its tokens are some",
            )
        # what media are is known by now, unless layers to come are given more of them
        needs_media = self._adds_between and not text_alone
        self._structure: dict[str, Any] = {
            name: value
            for name, value in prompt.items()
            if needs_media or name == "inputs_embeds" or not _is_media(value)
        } | {"token_map": self.tokens}

    def _compare(self, view: LayerView, hidden: Tensor) -> None:
        if not view.layer:
            self.first = hidden.detach()
        elif self._left is not None:
            self._adds_between = self._adds_between or not torch.equal(self._left, hidden)

    def _leave(self, view: LayerView, hidden: Tensor) -> None:
        if not self.text_alone:
            self._left = hidden.detach().clone()  # what is added may be added in place

    def _note(self, view: LayerView, hidden: Tensor) -> None:
        self.tokens = view.ctx.tokens
        text = self.tokens.is_text[0]
        self.entered[view.layer] = (hidden[:, text] if self.text_alone else hidden).detach()

    def resumed(self, layer: int, policy: Policy) -> Tensor:
        """(T, V) logits under a policy that begins at a layer, whose input is known."""

        def place(stand: Stand) -> None:
            for below in range(layer):
                stand.work(below, _Nobody())
            if layer:  # for those who look at it from where they stand, as Wings' learners do
                stand.at(Point.BLOCK_INPUT, 0, lambda view, hidden: self.first)
            stand.at(Point.BLOCK_INPUT, layer, self._entering)
            policy.place(stand)

        with marked(READING):  # what media are has been put into what enters, and is not written anew
            return self._run(place, self._structure)

    def _entering(self, view: LayerView, hidden: Tensor) -> Tensor:
        known = self.entered[view.layer]
        if not self.text_alone:
            return known
        every = torch.zeros_like(hidden)
        every[:, view.ctx.tokens.is_text[0]] = known
        return every

    def _run(self, place: Callable[[Stand], None], inputs: Prompt) -> Tensor:
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(Anatomy.of(self.model).host.forward).parameters:
            options["logits_to_keep"] = self.count
        # the first of the logits are those of the prompt's last token
        told = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
        ends = torch.tensor([told.shape[1] - self.count], device=told.device)
        with asked(self.model, Owner(), place, object()), evaluating(self.model), torch.no_grad():
            logits: Tensor = self.model(**scoring_inputs(self.model, inputs, ends), **options).logits
        logits = logits[0, -self.count :].double()
        barred = torch.tensor(self._barred, dtype=torch.int64, device=logits.device)
        return logits.index_fill(-1, barred, -torch.inf)


class _Nobody:
    """Has no token in a layer."""

    def work(self, view: LayerView, hidden: Tensor) -> Work:
        return _NOBODY


_NOBODY = Work.of(False)


def _checked(prompts: Iterable[Prompt]) -> Iterable[Prompt]:
    """The prompts, each of batch size 1 and without padding.

    Raises:
        UsageError: one is not; or there are none.
    """
    index = -1
    for index, prompt in enumerate(prompts):
        reference = prompt.get("input_ids") if prompt.get("input_ids") is not None else prompt.get("inputs_embeds")
        mask = prompt.get("attention_mask")
        if not isinstance(reference, Tensor) or len(reference) != 1:
            raise UsageError(
                f"prompt {index} is not one prompt",
                remedy="give the model's inputs of one prompt each, of batch size 1: "
                'processor(images=image, text=text, return_tensors="pt")',
            )
        if isinstance(mask, Tensor) and not bool(mask.bool().all()):
            raise UsageError(f"prompt {index} is padded", remedy="prepare prompts one by one, without padding")
        yield prompt
    if index < 0:
        raise UsageError("there are no prompts", remedy="give some of the data that the model is to be used on")


def _answered(model: Any, prompt: Prompt, max_new_tokens: int) -> tuple[dict[str, Any], Tensor]:
    """A prompt followed by all but the last token of the model's greedy answer, and the (T,) answer."""
    ids = prompt.get("input_ids")
    if ids is None or prompt.get("position_ids") is not None:
        raise UsageError(
            "a prompt of inputs_embeds or with position_ids cannot be followed by its answer",
            remedy="give input_ids without position_ids, or max_new_tokens=1 to go by the first token alone",
        )
    own, tokens = model.generation_config, prompt.get("token_map")
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_length=0,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        num_beams=1,
        repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        use_cache=True,
    )
    with asked(model, Owner(), lambda stand: None, object()), evaluating(model), torch.no_grad():
        seam = find(model)
        assert seam is not None
        with (
            nullcontext() if tokens is None else seam.given_tokens(tokens),
            generation_extras(model, {name: each for name, each in prompt.items() if name != "token_map"}) as given,
        ):
            whole: Tensor = model.generate(**given, generation_config=plain)
    more = whole.shape[1] - ids.shape[1] - 1
    read = {
        name: torch.nn.functional.pad(each, (0, more), value=int(name == "attention_mask"))
        for name, each in prompt.items()
        if isinstance(each, Tensor) and each.shape == ids.shape and not _is_media(each)
    }
    if tokens is not None:
        read["token_map"] = tokens.append(TokenMap.text(1, more, device=tokens.device))
    return {**prompt, **read, "input_ids": whole[:, :-1]}, whole[0, ids.shape[1] :]


def _is_media(value: Any) -> bool:
    """Whether an input is what media consist of, and not what says where they stand."""
    if isinstance(value, Mapping):
        return any(map(_is_media, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_media, value))
    return isinstance(value, Tensor) and value.is_floating_point()


def _divergence(ours: Tensor, full: Tensor) -> float:
    """KL(ours || full) of two (V,) logits, in nats; what is barred in both counts for nothing."""
    here, there = (torch.log_softmax(each, dim=-1) for each in (ours, full))
    return float((here.exp() * (here - there)).nan_to_num(0.0).sum())
