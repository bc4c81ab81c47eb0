"""One request by itself, through the model's own `generate`: what cannot be computed together with others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from alula.anatomy import unwrap
from alula.errors import HostError, UsageError
from alula.inputs import placed
from alula.policies import Budget
from alula.seam import find, generation_extras
from alula.serving.engine.answer import Answer
from alula.serving.engine.errors import RequestError
from alula.serving.engine.gaze import Gaze, gazing
from alula.serving.engine.looks import Looking
from alula.serving.engine.prompts import Prepared
from alula.serving.engine.request import Highlighted, Request
from alula.serving.engine.resident import Resident
from alula.serving.engine.sampling import draw
from alula.steering import Prompt, highlight


def check(request: Request, prepared: Prepared) -> None:
    """Refuse what is asked about pictures where there are none, or where the model reads them as codes among its words
    (TEAL). Policies that concern text hold for words alone too.

    Raises:
        RequestError: that names the field.
    """
    about = {"image_tokens": request.image_tokens is not None, "attention": request.attention}
    policies = (request.policies or {}).values()
    if prepared.kinds:
        if (prepared.items != -1).any():
            return
        about["highlight"] = request.highlight is not None and bool(request.highlight.regions)
        why = "this model reads pictures as codes, words like others to it, and which are a picture's is not told"
        instead = "ask the base"
    else:
        about["policies"] = bool(policies) and not any(policy.concerns_text for policy in policies)
        why = "it is about what a model sees or hears, and there are words alone"
        instead = "give a picture"
    for name, is_asked in about.items():
        if is_asked:
            raise RequestError(why, where=name, remedy=f"leave {name} out, or {instead}")


def rehearse(resident: Resident, request: Request, prepared: Prepared) -> None:
    """Refuse what `run` refuses before its first forward: policies that the model cannot have, and marks of what is not
    there.

    Raises:
        RequestError: that names the field.
    """
    if request.changes_forwards:
        # a tree on which nothing is computed: what is put on and taken off it is in nobody's way
        with resident.preparing, _refusing(request), _changed(resident.rehearsing, request, prepared, resident):
            pass


def run(resident: Resident, request: Request, prepared: Prepared, answer: Answer) -> None:
    """Compute an answer to its end.

    Raises:
        AlulaError, or whatever the model does.
    """
    model = resident.steered if request.is_steered else resident.model
    picking = _Picking(answer)
    inputs = placed(prepared.inputs, next(model.parameters()))
    with ExitStack() as stack:
        stack.enter_context(_refusing(request))
        stack.enter_context(torch.inference_mode())
        if any("dynamic" in kind for kind in resident.anatomy.rope_types):  # its angles stay those of a longer prompt
            unwrap(model)(input_ids=inputs["input_ids"][:, :1], use_cache=False)
        stack.enter_context(_told(model, request, replace(prepared, inputs=inputs), resident, picking))
        seam = find(model)
        if seam is not None and prepared.roles is not None:
            stack.enter_context(seam.given_roles(torch.tensor([prepared.roles])))
        given = stack.enter_context(generation_extras(model, inputs))
        brought = given.pop("logits_processor", ())
        model.generate(
            **given,
            **drawn_here(resident, answer.most + 1),  # the answer ends itself
            logits_processor=LogitsProcessorList([*brought, picking]),
            stopping_criteria=StoppingCriteriaList([_Ending(answer)]),
        )
    if answer.reason is None:
        answer.end("length")


def drawn_here(resident: Resident, most: int) -> dict[str, Any]:
    """Arguments of `generate` that leave to others what `Sampler` does, and when an answer of up to `most` tokens ends;
    the rest is the checkpoint's."""
    config = copy.deepcopy(resident.model.generation_config)
    config.max_new_tokens, config.max_length = most, None
    config.temperature = config.top_p = config.top_k = config.min_p = None  # of sampling, which is not done
    # neutral values of the others: the checkpoint's would stand in for None
    config.do_sample, config.num_beams, config.repetition_penalty, config.suppress_tokens = False, 1, 1.0, []
    if config.pad_token_id is None:
        config.pad_token_id = next(iter(resident.ends), 0)
    return {"generation_config": config, "tokenizer": resident.tokenizer}  # which texts that end an answer are read by


@contextmanager
def _refusing(request: Request) -> Iterator[None]:
    """What a forward finds wrong with what it was asked for is the request's, not the model's.

    Raises:
        RequestError: that names the field, if there is one that changes forwards.
    """
    asked = [name for name in ("highlight", "image_tokens", "policies") if getattr(request, name)]
    try:
        yield
    except RequestError:
        raise
    except (UsageError, HostError) as error:
        if not asked:
            raise
        where = asked[0] if len(asked) == 1 else None
        raise RequestError(error.message, where=where, remedy=error.remedy) from error


@contextmanager
def _told(model: Any, request: Request, prepared: Prepared, resident: Resident, picking: _Picking) -> Iterator[None]:
    """What holds for the forwards of a request, and reads them."""
    with _changed(model, request, prepared, resident), ExitStack() as stack:
        if request.attention:
            is_cut = bool(request.image_tokens or request.policies)
            gaze = Gaze()
            picking.watch(gaze, Looking(prepared, resident.anatomy, is_cut=is_cut))
            stack.enter_context(gazing(model, gaze))
        yield


@contextmanager
def _changed(model: Any, request: Request, prepared: Prepared, resident: Resident) -> Iterator[None]:
    """What makes the forwards of a request others than they would be."""
    with ExitStack() as stack:
        if request.image_tokens is not None and prepared.kinds:
            stack.enter_context(Budget(image_tokens=request.image_tokens).on(model))
        for name, policy in (request.policies or {}).items():
            try:
                stack.enter_context(policy.on(model))
            except (UsageError, HostError) as error:
                within = f"{name}.{error.where}" if error.where in type(policy).model_fields else name
                raise RequestError(error.message, where=f"policies: {within}", remedy=error.remedy) from None
        try:
            stack.enter_context(_highlighted(model, request, prepared, resident))
        except (UsageError, HostError) as error:
            raise RequestError(error.message, where="highlight", remedy=error.remedy) from None
        yield


def _highlighted(model: Any, request: Request, prepared: Prepared, resident: Resident) -> Any:
    asked = request.highlight
    if asked is None:
        return nullcontext()
    prompt = Prompt(model, resident.intake(request.template), dict(prepared.inputs), prepared.messages)
    return highlight(
        model,
        prompt,
        spans=list(asked.spans),
        regions=_regions(asked),
        strength=asked.strength,
        guidance=asked.guidance,
    )


def _regions(asked: Highlighted) -> list[Any]:
    """Regions, each of which names its medium by itself."""
    found = []
    for each in asked.regions:
        if isinstance(each, tuple):
            item, region = each
            name = next((name for name in ("image", "film", "sound", "index") if hasattr(region, name)), "image")
            each = replace(region, **{name: item})
        found.append(each)
    return found


class _Picking(LogitsProcessor):
    """Draws each token by the request's own sampler, and leaves `generate` no other choice."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.gaze: Gaze | None = None
        self._looking: Looking | None = None

    def watch(self, gaze: Gaze, looking: Looking) -> None:
        """Tell of tokens where they looked."""
        self.gaze, self._looking = gaze, looking

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        _, (token,) = draw([self.answer.sampler], scores)
        self.answer.weigh(scores[0], token)
        looks = None
        if self.gaze is not None and self._looking is not None:
            read = self.gaze.taken()
            looks = self._looking.looks(read[0]) if read else []
        self.answer.take(token, looks)
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, token] = 0
        return chosen


class _Ending(StoppingCriteria):
    """Ends `generate` with the answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        over = self.answer.reason is not None
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)
