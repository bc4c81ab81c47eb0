"""An experiment over seeds: what every part of the report draws from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from alula.evaluation import SeedsComparison, SeedsResult, across_seeds
from alula.evaluation.pairing import KIND
from alula.reports.outcome import MethodOutcome, Outcome

TEXT, VISUAL = "text", "visual"


@dataclass(frozen=True)
class Method:
    """One method with its place in the report (its colour and marker)."""

    name: str
    series: int
    outcome: MethodOutcome

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.outcome.label


class Summary:
    """Answers to what a report asks of an `Outcome`, each computed once."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.methods = [Method(name, index, method) for index, (name, method) in enumerate(outcome.methods.items())]
        self._cache: dict[tuple[str, str, str | tuple[str, ...]], SeedsResult] = {}

    @cached_property
    def text_tasks(self) -> list[str]:
        """Tasks of text skill: those whose share of the base's accuracy matters."""
        return [task for task in self.outcome.tasks if self._kinds(task) == {TEXT}]

    @cached_property
    def visual_tasks(self) -> list[str]:
        """Tasks of one skill that is no text skill (images, video or audio): those whose accuracy matters."""
        return [task for task in self.outcome.tasks if len(kinds := self._kinds(task)) == 1 and TEXT not in kinds]

    @cached_property
    def mixed_tasks(self) -> list[str]:
        """Tasks with text and visual items, such as dialogues."""
        return [task for task in self.outcome.tasks if len(self._kinds(task)) > 1]

    def result(self, method: Method, task: str, by: str | tuple[str, ...] = "family") -> SeedsResult:
        """The task over the method's seeds, broken down by a label."""
        key = (method.name, task, by)
        if key not in self._cache:
            self._cache[key] = across_seeds(method.outcome.results(task), by=by)
        return self._cache[key]

    def overall(self, method: Method, task: str) -> SeedsComparison:
        """The task as a whole over the method's seeds."""
        return self.result(method, task, ()).overall

    def of_kind(self, method: Method, task: str, kind: str) -> SeedsComparison:
        """The text or visual items of a mixed task."""
        return self.result(method, task, KIND).groups[kind]

    def beyond_chance(self, method: Method, task: str, family: str) -> bool:
        """Whether every seed changed the family significantly (McNemar, Holm over families, 5 %)."""
        return all(result.families[family].p_holm < 0.05 for result in method.outcome.results(task))

    def base_accuracy(self, task: str) -> float:
        """The base's accuracy, averaged over what each method was compared with."""
        values = [self.overall(method, task).base.mean.value for method in self.methods]
        return sum(values) / len(values)

    def title(self, task: str) -> str:
        """The task's name for people."""
        return self.outcome.tasks[task]

    def _kinds(self, task: str) -> set[str]:
        labels = self.methods[0].outcome.results(task)[0].columns.labels
        return set(labels[KIND].values) if KIND in labels else {TEXT}
