"""What is measured of a model: closed choices by likelihood, captions and pictures, and the old text skills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alula.data.captions import CaptionedPicture
from alula.draws import Draw
from alula.evaluation import evaluate
from alula.evaluation.retrieval import evaluate_captions
from alula.files import write_json
from alula.grafts import grafts_of
from alula.grafts.mks2 import MKS2Graft
from alula.grafts.mks2.memory import MemoryRouter
from alula.inputs import Intake
from alula.loading import load_model
from alula.training.parts import find_parts
from alula_fledgling.microworld.items import Split, user
from alula_fledgling.microworld.named import (
    NAMED_FAMILIES,
    NamedQuestion,
    named_picture,
    named_questions,
    named_world,
)
from alula_fledgling.microworld.render import SceneImage
from alula_fledgling.tasks import text_bare
from studies.visual_knowledge.arms import ARMS, BEFORE
from studies.visual_knowledge.plan import KnowledgePlan

BATCH = 96  # rows per forward, prompts per generate call
SPLITS: Mapping[str, Split] = {"held": "test", "tutored": "train"}


def measure(plan: KnowledgePlan, seed: int, name: str) -> None:
    """Measure an arm's model, or the one before, unless that was done."""
    path = plan.measured(seed, name)
    if path.is_file():
        return
    loaded = load_model(plan.model(seed, name))
    model, intake = loaded.model, Intake.of(loaded.processor)
    answers = {
        kind: {family: answered(model, intake, named_questions(seed, split, family)) for family in NAMED_FAMILIES}
        for kind, split in SPLITS.items()
    }
    graft = next((each for each in grafts_of(model).values() if isinstance(each, MKS2Graft)), None)
    stored = graft is not None and graft.compares
    pictures = {"use": _pictures(model, loaded.processor, seed)}
    if stored:
        assert graft is not None
        with graft.using("store"):
            pictures["store"] = _pictures(model, loaded.processor, seed)
    skills = evaluate(model, loaded.processor, [text_bare(plan.items, plan.task_seed)], name=name, batch_size=BATCH)
    text = [item.score for item in skills.tasks["text_bare"].items]
    write_json(
        path,
        {
            "answers": answers,
            "pictures": pictures,
            "text": text,
            "trained": _trained(plan, seed, name, model),
            "weight": None if graft is None else router_weight(model, intake, seed),
        },
    )


@torch.no_grad()
def answered(model: Any, intake: Intake, questions: Sequence[NamedQuestion]) -> dict[str, list[Any]]:
    """Per question: what it is about, whether the likeliest choice is right, and -log of the right one's share."""
    found: dict[str, list[Any]] = {"about": [], "right": [], "nats": []}
    tokenizer = intake.tokenizer
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        for asked, likely in zip(part, _next(model, intake, [each.question for each in part]), strict=True):
            own = likely[[_token(tokenizer, choice) for choice in asked.choices]].log_softmax(dim=0)
            gold = asked.choices.index(asked.answer)
            found["about"].append(asked.about)
            found["right"].append(float(int(own.argmax()) == gold))
            found["nats"].append(float(-own[gold]))
    return found


def _token(tokenizer: Any, choice: str) -> int:
    """The one token that a choice is."""
    (token,) = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
    return int(token)


def _next(model: Any, intake: Intake, questions: Sequence[str]) -> Tensor:
    """(Q, V) float64 log-likelihood of the first token of answers."""
    intake.tokenizer.padding_side = "left"
    inputs = intake.processor.apply_chat_template(
        [[user(question)] for question in questions],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    device = next(model.parameters()).device
    logits = model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False).logits
    return logits[:, -1].double().log_softmax(dim=-1).cpu()


@torch.no_grad()
def router_weight(model: Any, intake: Intake, seed: int) -> float:
    """What the router gives the memory, mean over layers and tokens of questions about the colour of held things."""
    found: list[float] = []
    handles = [
        module.register_forward_hook(lambda _, given, weights: found.append(float(weights[..., 0].mean())))
        for module in model.modules()
        if isinstance(module, MemoryRouter)
    ]
    try:
        for asked in named_questions(seed, "test", "colour"):  # one by one, so that nothing is padded
            _next(model, intake, [asked.question])
    finally:
        for handle in handles:
            handle.remove()
    return sum(found) / len(found)


def _pictures(model: Any, processor: Any, seed: int) -> dict[str, Any]:
    """A picture of each thing: which are named right, and, where captions and pictures are compared,
    how often captions find their picture and pictures their caption."""
    shown = []
    for thing in named_world(seed).things:
        draw = Draw("named pictures", seed, thing.name)
        picture = named_picture(draw, seed, "test", thing)
        image = SceneImage(picture.scene)
        asked = (user("Who is in the picture?", image),)
        shown.append(CaptionedPicture(thing.name, image, (picture.caption,), asked))
    run = evaluate_captions(model, processor, shown, batch_size=BATCH, max_new_tokens=6)
    named = [float(run.captions[each.id].split()[:1] == [each.id]) for each in shown]
    recall = run.recall
    found = None if recall is None else [recall.caption_to_image[1].value, recall.image_to_caption[1].value]
    return {"named": named, "found": found}


def _trained(plan: KnowledgePlan, seed: int, name: str, model: Any) -> dict[str, int]:
    """Part -> number of weights that were trained in any stage."""
    if name == BEFORE:
        return {}
    arm = next(each for each in ARMS if each.name == name)
    parts = {part for stage in plan.recipe_of(seed, arm).stages for part in stage.learning_rates}
    groups = {group: found for each in grafts_of(model).values() for group, found in each.parameters_by_part().items()}
    return {
        part: sum(parameter.numel() for _, parameter in named)
        for part, named in find_parts(model, sorted(parts), groups).items()
    }
