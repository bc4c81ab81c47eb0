"""Two models on the same items: what was kept, what was lost, what was gained, and how sure one can be."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alula import stats
from alula.errors import EvaluationError, UsageError
from alula.evaluation import ratios, token_ids
from alula.evaluation.references import REFERENCES, weighed_by_both, weighed_by_one
from alula.evaluation.results import (
    Columns,
    Comparison,
    Conditions,
    FamilyComparison,
    Flip,
    ItemResult,
    Labels,
    PairedResult,
    PairedRun,
    RunResult,
    TaskResult,
)
from alula.seam import stock_attention
from alula.stats import PAIRED, Resampling

KEPT_FLIPS = 12
KIND = "kind"
"""the tag that says whether an item is of text or of visual skill"""
_CORRECT = 1.0


def compare(
    base: RunResult,
    tuned: RunResult,
    *,
    kept_flips: int = KEPT_FLIPS,
    how: Resampling = PAIRED,
) -> PairedRun:
    """Compare two runs task by task, over the tasks both have.

    Args:
        base: the run to compare with (before).
        tuned: the run of interest (after).
        kept_flips: lost and gained items kept with their prompts, per task and direction, spread evenly over families;
            all of them are counted.
        how: confidence, number and seed of the bootstrap resamples.

    Raises:
        UsageError: what is to be compared is no run.
        EvaluationError: no common task, other prompts (the first item whose token ids differ is named, with the first
            place where they do), other decoding, dtype or metric, items that fit into the context of one model only.
    """
    for run in (base, tuned):
        if not isinstance(run, RunResult):
            raise UsageError(
                f"a {type(run).__name__} is no run", remedy="give what evaluate returns, or RunResult.load"
            )
    common = [name for name in base.tasks if name in tuned.tasks]
    if not common:
        raise EvaluationError(
            f"no task in common: {base.model} answered {', '.join(base.tasks)}; {tuned.model} {', '.join(tuned.tasks)}"
        )
    notes = _compare_conditions(base.conditions, tuned.conditions)
    tasks = {}
    for name in common:
        _compare_asked(name, base.model, base.tasks[name], tuned.model, tuned.tasks[name])
        before, after = _scored_by_both(name, base.tasks[name], tuned.tasks[name])
        _compare_prompts(name, before, after)
        tasks[name] = _pair(before, after, kept_flips, how).model_copy(
            update={
                "notes": [
                    *notes,
                    *_setting_notes(before, after),
                    *_unrecorded_notes(base.model, before),
                    *_unrecorded_notes(tuned.model, after),
                    *_reference_notes(base.model, before, tuned.model, after),
                    *(f"{base.model}: {note}" for note in before.notes),
                    *(f"{tuned.model}: {note}" for note in after.notes),
                ]
            }
        )
    return PairedRun(
        base=base.model,
        tuned=tuned.model,
        base_conditions=base.conditions,
        tuned_conditions=tuned.conditions,
        tasks=tasks,
    )


def compare_scores(
    base: NDArray[np.float64],
    tuned: NDArray[np.float64],
    cluster: NDArray[np.int64],
    how: Resampling = PAIRED,
) -> Comparison:
    """Return the statistics of paired per-item scores, each of shape (items,); see `Comparison` for what they are."""
    n = len(base)
    sums = stats.Sums.of(base, tuned, cluster)
    resampled = stats.resample(sums, how)
    right_before, right_after = base >= _CORRECT, tuned >= _CORRECT
    lost, gained = int((right_before & ~right_after).sum()), int((~right_before & right_after).sum())
    fell, rose = bool((tuned < base).any()), bool((tuned > base).any())
    beyond = stats.Unmoved.of(sums, fell=fell, rose=rose, confidence=how.confidence)
    kept = stats.bootstrap(sums, resampled, stats.retention, how.confidence) if base.sum() > 0 else None
    return Comparison(
        n=n,
        base=stats.wilson(float(base.sum()), n, how.confidence),
        tuned=stats.wilson(float(tuned.sum()), n, how.confidence),
        difference=beyond.difference(stats.bootstrap(sums, resampled, stats.difference, how.confidence)),
        retention=None if kept is None else beyond.retention(kept),
        exact=beyond.sides,
        lost=lost,
        gained=gained,
        p_value=stats.mcnemar(lost, gained),
    )


def _pair(before: TaskResult, after: TaskResult, kept_flips: int, how: Resampling) -> PairedResult:
    # items that ask exactly the same are one unit too: their answers are the same
    units = Labels.of([item.cluster or item.prompt_hash for item in before.items])
    columns = Columns(
        labels=_labels(before.items),
        cluster=units.index,
        base=[item.score for item in before.items],
        tuned=[item.score for item in after.items],
    )
    base, tuned, cluster = np.array(columns.base), np.array(columns.tuned), np.array(columns.cluster)
    names, family = columns.labels["family"].values, np.array(columns.labels["family"].index)
    parts = {
        name: compare_scores(base[family == index], tuned[family == index], cluster[family == index], how)
        for index, name in enumerate(names)
    }
    corrected = stats.holm([part.p_value for part in parts.values()])
    pairs = list(zip(before.items, after.items, strict=True))
    told = [ratio for ratio in after.ratios if ratio != REFERENCES or REFERENCES in before.ratios]
    return PairedResult(
        task=before.name,
        title=before.title,
        confidence=how.confidence,
        overall=compare_scores(base, tuned, cluster, how),
        families={
            name: FamilyComparison(**part.model_dump(), p_holm=p)
            for (name, part), p in zip(parts.items(), corrected, strict=True)
        },
        identical_answers=sum(first.answer == second.answer for first, second in pairs),
        lost=_flips([pair for pair in pairs if pair[0].score >= _CORRECT > pair[1].score], kept_flips),
        gained=_flips([pair for pair in pairs if pair[1].score >= _CORRECT > pair[0].score], kept_flips),
        items_digest=_digest(before),
        columns=columns,
        ratios=told,
        figures=ratios.compared_figures(*weighed_by_both(before.items, after.items), told, how),
    )


def _labels(items: Sequence[ItemResult]) -> dict[str, Labels]:
    found = {"family": Labels.of([item.family for item in items])}
    for tag in dict.fromkeys(tag for item in items for tag in item.tags):
        labels = Labels.of([item.tags.get(tag, "") for item in items])
        if (len(labels.values) > 1 or tag == KIND) and tag not in found:
            found[tag] = labels
    return found


def _flips(pairs: Sequence[tuple[ItemResult, ItemResult]], limit: int) -> list[Flip]:
    by_family: dict[str, list[tuple[ItemResult, ItemResult]]] = defaultdict(list)
    for pair in pairs:
        by_family[pair[0].family].append(pair)
    chosen: list[tuple[ItemResult, ItemResult]] = []
    rank = 0
    while len(chosen) < min(limit, len(pairs)):
        layer = [group[rank] for group in by_family.values() if rank < len(group)]
        chosen += layer[: limit - len(chosen)]
        rank += 1
    return [
        Flip(
            id=before.id,
            family=before.family,
            prompt=after.prompt,
            gold=before.gold,
            base_answer=before.answer,
            tuned_answer=after.answer,
        )
        for before, after in chosen
    ]


def _digest(task: TaskResult) -> str:
    digest = hashlib.sha256()
    for item in task.items:
        digest.update(f"{item.id}\n{item.prompt_hash}\n".encode())
    return digest.hexdigest()


def _compare_asked(name: str, base: str, before: TaskResult, tuned: str, after: TaskResult) -> None:
    """Refuse runs of which one left out what the other was asked: the rest would be another, easier set."""
    sides = (base, before, {item.id for item in after.too_long}), (tuned, after, {item.id for item in before.too_long})
    for model, task, others in sides:
        for item in task.too_long:
            if item.id not in others:
                raise EvaluationError(
                    f"{model} was not asked item {item.id!r}, whose prompt takes {item.tokens} of the {task.context} "
                    "tokens of its context; the other model was",
                    where=f"task {name!r}",
                    remedy="leave out of the data what does not fit into both: `too_long` in the results lists it",
                )


def _compare_prompts(name: str, before: TaskResult, after: TaskResult) -> None:
    remedy = "evaluate both models again with the same items, processor and chat template"
    for first, second in zip(before.items, after.items, strict=False):
        if first.id != second.id:
            raise EvaluationError(
                f"the runs have other items: {first.id!r} against {second.id!r}", where=f"task {name!r}", remedy=remedy
            )
        parted = _parted(first, second)
        if parted is not None:
            raise EvaluationError(f"the models were asked differently: {parted}", where=f"task {name!r}", remedy=remedy)
        if first.gold != second.gold:
            raise EvaluationError(
                f"item {first.id!r} was scored against {first.gold!r} and {second.gold!r}", where=f"task {name!r}"
            )
    if len(before.items) != len(after.items):
        raise EvaluationError(
            f"the runs have {len(before.items)} and {len(after.items)} items", where=f"task {name!r}", remedy=remedy
        )
    metrics = [_metrics(task) for task in (before, after)]
    if metrics[0] != metrics[1]:
        raise EvaluationError(
            f"the runs were scored by other metrics: {_plain(metrics[0])} against {_plain(metrics[1])}",
            where=f"task {name!r}",
            remedy="name the metric (NAME:METRIC), and evaluate both models again",
        )
    if before.max_new_tokens != after.max_new_tokens:
        raise EvaluationError(
            f"answers were cut at {before.max_new_tokens} and {after.max_new_tokens} tokens", where=f"task {name!r}"
        )


def _parted(first: ItemResult, second: ItemResult) -> str | None:
    """How the prompts of an item differ, or None."""
    found = token_ids.difference(first.token_ids, second.token_ids) if first.token_ids and second.token_ids else None
    if found is not None:
        here, there = ("nothing" if token is None else str(token) for token in (found.first, found.second))
        row = f" of its text {found.row + 1}" if found.row else ""
        return (
            f"the token ids of item {first.id!r} differ from position {found.position}{row} on, "
            f"{here} against {there} (another BOS rule, chat template, date or vocabulary)"
        )
    if first.prompt_hash != second.prompt_hash:
        return f"the prompt hashes of item {first.id!r} are {first.prompt_hash[:12]} and {second.prompt_hash[:12]}"
    return None


def _scored_by_both(name: str, before: TaskResult, after: TaskResult) -> tuple[TaskResult, TaskResult]:
    """The tasks without the items that could not be scored for one of the two models."""
    unscored = {*before.unscored, *after.unscored}
    if not unscored:
        return before, after
    kept = [
        task.model_copy(update={"items": [item for item in task.items if item.id not in unscored]})
        for task in (before, after)
    ]
    if not kept[0].items:
        raise EvaluationError("no item has a score for both models", where=f"task {name!r}")
    return kept[0], kept[1]


def _compare_conditions(before: Conditions, after: Conditions) -> list[str]:
    for key in ("decoding", "dtype", "template"):
        first, second = getattr(before, key), getattr(after, key)
        if first != second:
            raise EvaluationError(f"the runs differ in {key}: {first} against {second}", remedy="use the same for both")
    notes = []
    if before.policies != after.policies:
        first, second = (" and ".join(each.policies_in_words) or "none" for each in (before, after))
        notes.append(f"policies differ: {first} before, {second} after")
    for key in ("batch_size", "device", "backend"):
        first, second = getattr(before, key), getattr(after, key)
        if key == "backend":
            first, second = _same_parts(first, second)
        if first != second:
            notes.append(f"{key.replace('_', ' ')} differs: {_plain(first)} before, {_plain(second)} after")
    for package in sorted({*before.versions, *after.versions}):
        first, second = before.versions.get(package, "absent"), after.versions.get(package, "absent")
        if first != second:
            notes.append(f"{package} differs: {first} before, {second} after")
    return notes


def _same_parts(*backends: dict[str, str]) -> list[dict[str, str]]:
    """Attention of the parts that both models have, where grafts ask it for sums as the stock one it computes."""
    shared = set.intersection(*map(set, backends))
    return [{part: stock_attention(name) for part, name in each.items() if part in shared} for each in backends]


def _setting_notes(before: TaskResult, after: TaskResult) -> list[str]:
    """What was set otherwise though the prompts are the same, such as whose answers stand in a history."""
    pairs = {
        key: (before.settings.get(key), after.settings.get(key))
        for key in dict.fromkeys([*before.settings, *after.settings])
        if key != "source"  # where a file lay says nothing
    }
    return [
        f"{before.title}: {key} differs: {_plain(first)} before, {_plain(second)} after"
        for key, (first, second) in pairs.items()
        if first != second
    ]


def _plain(value: object) -> str:
    return ", ".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _metrics(task: TaskResult) -> dict[str, str]:
    """What scores each harness task inside ``task``."""
    leaves = task.settings.get("harness", {})
    return {leaf: f"{about.get('metric')} ({about.get('filter')})" for leaf, about in leaves.items()}


def _unrecorded_notes(model: str, task: TaskResult) -> list[str]:
    if all(item.token_ids for item in task.items):
        return []
    return [f"{model}: token ids were not recorded (an earlier version's file), so prompts were compared by hash alone"]


def _reference_notes(base: str, before: TaskResult, tuned: str, after: TaskResult) -> list[str]:
    if (REFERENCES in before.ratios) != (REFERENCES in after.ratios):
        return [f"how likely references are was weighed of {base if REFERENCES in before.ratios else tuned} alone"]
    left_out = weighed_by_one(before.items, after.items)
    if not left_out:
        return []
    return [f"how likely references are leaves out {left_out}, which the two models do not weigh in the same tokens"]
