"""Whole reports over made-up scores: complete, self-contained, escaped, and the same from object, JSON and file."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from alula.errors import EvaluationError
from alula.evaluation import RunResult, compare, named_tasks
from alula.evaluation.ratios import figures
from alula.evaluation.references import REFERENCES
from alula.reports import (
    Document,
    Outcome,
    Section,
    comparison_outcome,
    comparison_report,
    document,
    experiment_report,
    experiment_table,
    read_curve,
    render,
    run_report,
    run_table,
)
from alula.reports.document import Table
from alula.reports.names import short_names
from alula.reports.summary import Summary
from alula.reports.wording import bounds, count, duration, listing, percent, probability, rates
from alula_fledgling.tasks import native_tasks
from tests.reports.conftest import made_outcome, made_run

VOID = {"meta", "link", "img", "br", "input", "path", "line", "rect", "circle"}


class Page(HTMLParser):
    """Checks that tags close in order and collects what a page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key == "id":
                assert value not in self.ids
                self.ids.add(value or "")
            if key in ("src", "href", "action", "data"):
                self.targets.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def html(outcome: Outcome) -> str:
    return experiment_report(outcome)


def test_page_is_well_formed_and_asks_nobody_for_anything(html: str) -> None:
    page = Page(html)
    for target in page.targets:
        assert target.startswith("data:image/png;base64,") or target[1:] in page.ids, target
    outside = re.sub(r'data:image/png;base64,[^"]*', "", html)
    assert "http" not in outside.replace("http-equiv", "")
    assert "url(" not in outside
    assert "@import" not in outside


def test_everything_a_reader_needs_is_there(html: str, outcome: Outcome) -> None:
    words = Page(html).words
    for title in (
        "Kept against learned",
        "The figures",
        "Which text skills were kept",
        "What they see",
        "In dialogues",
        "How training went",
        "Items lost and gained",
        "To repeat this",
    ):
        assert title in words
    for method in outcome.methods.values():
        assert method.label in words
    assert outcome.command in words
    assert "2.13.0+cpu" in words
    assert "0, 1 and 2" in words
    assert "character for character" in words  # the made-up Wings changes nothing on bare text


def test_numbers_shown_are_the_records_numbers(html: str, outcome: Outcome) -> None:
    words = Page(html).words
    for method in outcome.methods.values():
        results = [seed.tasks["text_bare"] for seed in method.seeds.values()]
        kept = np.mean([sum(r.columns.tuned) / sum(r.columns.base) for r in results])
        assert percent(float(kept)).split()[0] in words
        for result in results:
            assert f"{result.overall.lost} lost, {result.overall.gained} gained" in words


def test_object_json_and_file_give_the_same_page(html: str, outcome: Outcome, tmp_path: Path) -> None:
    path = outcome.save(tmp_path / "outcome.json")
    assert Outcome.load(path) == outcome
    assert experiment_report(path) == html
    assert experiment_report(json.loads(path.read_text())) == html
    with pytest.raises(EvaluationError, match="cannot be read"):
        experiment_report(tmp_path / "missing.json")


def test_what_models_say_cannot_become_markup(outcome: Outcome) -> None:
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    spoilt = outcome.model_copy(deep=True)
    spoilt.title = spoilt.base.label = spoilt.command = nasty
    method = spoilt.methods["full"]
    method.label = method.description = nasty
    for flip in method.seeds[0].tasks["text_bare"].lost:
        flip.tuned_answer = flip.gold = flip.family = nasty
        flip.prompt[0].content[0].text = nasty
    assert method.seeds[0].tasks["text_bare"].lost
    html = experiment_report(spoilt)
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    Page(html)


def test_one_training_of_one_method_on_text_alone() -> None:
    tasks = native_tasks(["text_bare"], n=30)
    pairs = compare(
        made_run(tasks, "a/base", lambda t, k, kind: k % 5 > 0),
        made_run(tasks, "b/tuned", lambda t, k, kind: k % 4 > 0),
    )
    outcome = comparison_outcome(pairs, command="alula eval b/tuned --base a/base", seconds=3.0)
    page = Page(experiment_report(outcome))
    assert "tuned against base" in page.words
    assert "What they see" not in page.words
    assert "How training went" not in page.words
    assert "One training says nothing" in page.words


def test_models_of_the_same_folder_name_are_told_apart() -> None:
    tasks = native_tasks(["text_bare"], n=10)
    one, two = (made_run(tasks, name, lambda t, k, kind: True) for name in ("runs/x/final", "runs/y/final"))
    assert comparison_outcome(compare(one, two), command="", seconds=0).title == "y against x"
    assert comparison_outcome(compare(one, one), command="", seconds=0).title == "runs/x/final against runs/x/final"


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (("runs/x/final", "runs/x/stages/01-align/model"), ("x", "x/align")),
        (("runs/q/seed-0/wings/final", "runs/q/seed-0/align/final"), ("wings", "align")),
        (("runs/x/final", "fledgling"), ("x", "fledgling")),
        (("org/model", "other/model"), ("org/model", "other/model")),
        (("runs/x/final", "runs/x/latest"), ("runs/x/final", "runs/x/latest")),
    ],
)
def test_models_in_runs_are_called_by_run_and_stage(pair: tuple[str, str], told: tuple[str, str]) -> None:
    assert short_names(*pair) == told


def test_what_the_base_could_not_be_asked_is_shown_of_the_tuned_model() -> None:
    tasks = native_tasks(["text_bare", "visual"], n=20)
    tuned = made_run(tasks, "runs/x/final", lambda t, k, kind: k % 4 > 0)
    base = made_run(tasks[:1], "llm", lambda t, k, kind: True)
    outcome = comparison_outcome(compare(base, tuned), command="", seconds=0)
    page = Page(comparison_report(outcome, tuned))
    assert "Asked of x alone" in page.words
    assert "Wrong answers of x" in page.words
    assert "75.0" in page.words  # of the visual questions
    assert page.words.count("answer") >= 10
    nothing_more = Page(comparison_report(outcome, made_run(tasks[:1], "runs/x/final", lambda t, k, kind: True)))
    assert "Asked of" not in nothing_more.words
    assert "Wrong answers" not in nothing_more.words


def test_a_task_of_one_family_has_one_figure_and_bases_stand_in_every_table() -> None:
    tasks = native_tasks(["text_bare", "visual"], n=20)
    runs = [made_run(tasks, name, lambda t, k, kind: k % 3 > 0) for name in ("base", "tuned")]
    for run in runs:
        for name, task in run.tasks.items():
            run.tasks[name] = task.model_copy(
                update={"items": [item.model_copy(update={"family": "mine"}) for item in task.items]}
            )
    outcome = comparison_outcome(compare(*runs), command="", seconds=0)
    sections = {section.title: section for section in document(outcome).sections}
    text, visual = (sections[name].blocks[0] for name in ("Which text skills were kept", "What they see"))
    assert [table.columns for table in (text, visual)] == [["", "all"]] * 2
    assert [[cell.text for cell in row][:1] for row in visual.rows] == [["base"], ["tuned"]]


def test_a_model_under_policies_is_told_apart_from_itself() -> None:
    tasks = native_tasks(["text_bare"], n=10)
    base = made_run(tasks, "host", lambda t, k, kind: True)
    policies = [{"policy_type": "withdraw", "layer": 3}]
    tuned = base.model_copy(update={"conditions": base.conditions.model_copy(update={"policies": policies})})
    assert comparison_outcome(compare(base, tuned), command="", seconds=0).title == (
        "host with withdraw (layer=3) against host"
    )


def test_a_base_that_knows_nothing(tmp_path: Path) -> None:
    tasks = native_tasks(["text_bare", "visual"], n=20)
    pairs = compare(
        made_run(tasks, "base", lambda t, k, kind: False), made_run(tasks, "tuned", lambda t, k, kind: True)
    )
    outcome = comparison_outcome(pairs, command="", seconds=0)
    page = Page(experiment_report(outcome)).words
    assert "n/a of text kept" in page
    table = next(each for each in document(outcome).sections if each.title == "The figures").blocks[0]
    assert table.columns[1] == "text, bare: kept"
    assert (table.rows[1][1].text, table.rows[1][1].note) == ("n/a", percent(1.0) + " right"), "0 % are not kept"
    assert "the base answers none of these" in page
    Console(width=100, file=(tmp_path / "x").open("w")).print(experiment_table(outcome))
    assert "*" not in (tmp_path / "x").read_text(), "no interval, no star"


def test_what_is_kept_is_explained_where_it_stands() -> None:
    for name, text in (("text_bare", True), ("visual", False)):
        tasks = native_tasks([name], n=10)
        runs = [made_run(tasks, each, lambda t, k, kind: k % 3 > 0) for each in ("base", "tuned")]
        outcome = comparison_outcome(compare(*runs), command="", seconds=0)
        assert ("Kept: accuracy" in Page(experiment_report(outcome)).words) == text
        assert ("kept: share" in str(experiment_table(outcome).caption)) == text


def weighed(run: RunResult, nats: float) -> RunResult:
    """A run of which the references were weighed: so many nats for every one of three tokens."""
    tasks = {}
    for name, task in run.tasks.items():
        counts = {"reference_nats": 3 * nats, "reference_tokens": 3.0}
        items = [item.model_copy(update={"counts": {**item.counts, **counts}}) for item in task.items]
        ratios = [*task.ratios, REFERENCES]
        tasks[name] = task.model_copy(update={"items": items, "ratios": ratios, "figures": figures(items, ratios)})
    return run.model_copy(update={"tasks": tasks})


@pytest.mark.parametrize(("shift", "told"), [(0.3, "x 1.35"), (40.0, "x e^40.0")])
def test_where_the_base_answers_nothing_the_headline_is_what_became_of_the_references(shift: float, told: str) -> None:
    tasks = native_tasks(["text_bare"], n=20)
    runs = [
        weighed(made_run(tasks, name, lambda t, k, kind: False), nats)
        for name, nats in (("base", 1.0), ("tuned", 1.0 + shift))
    ]
    page = Page(experiment_report(comparison_outcome(compare(*runs), command="", seconds=0))).words
    assert f"tuned {told} perplexity of the references" in page
    assert "of text kept" not in page


def test_figures_stand_under_what_they_are_about() -> None:
    """A task that counts by itself, and whose references were weighed."""
    tasks = named_tasks(["pope"], n=4)
    runs = []
    for name in ("base", "tuned"):
        run = made_run(tasks, name, lambda t, k, kind: True)
        counted = [
            item.model_copy(update={"counts": dict(tasks[0].counts(asked, item.answer))})
            for asked, item in zip(tasks[0].items(), run.tasks["pope"].items, strict=True)
        ]
        pope = run.tasks["pope"].model_copy(update={"items": counted, "ratios": list(tasks[0].ratios)})
        runs.append(weighed(run.model_copy(update={"tasks": {"pope": pope}}), 1.0))
    compared = document(comparison_outcome(compare(*runs), command="", seconds=0)).sections
    columns = {each.title: each.blocks[0].columns for each in compared if isinstance(each.blocks[0], Table)}
    weighs = "nats per token of the reference"
    assert columns["How likely the references are"] == ["", weighs]
    assert "recall" in columns["Objects made up"]
    assert weighs not in columns["Objects made up"]
    page = Page(run_report(runs[0], command="")).words
    assert page.index("Objects made up") < page.index("How likely the references are")


def test_the_name_of_one_model_is_not_broken_where_there_is_room() -> None:
    tasks = native_tasks(["text_bare"], n=10)
    runs = [made_run(tasks, name, lambda t, k, kind: True) for name in ("smollm2-135m-instruct", "tuned")]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(experiment_table(comparison_outcome(compare(*runs), command="", seconds=0)))
    assert "smollm2-135m-instruct " in console.export_text().splitlines()[1]


def test_one_models_report() -> None:
    tasks = native_tasks(["text_bare", "visual"], n=40)
    run = made_run(tasks, "me", lambda t, k, kind: k % 3 > 0)
    page = Page(run_report(run, command="alula eval me"))
    assert page.words.count("answer") >= 20
    assert "alula eval me" in page.words
    assert "65.0" in page.words  # 26 of 40
    assert all(target.startswith(("data:", "#")) for target in page.targets)


def test_a_caller_can_add_sections_of_its_own(outcome: Outcome) -> None:
    report = document(outcome)
    more = Document(report.title, report.lead, [*report.sections, Section("An audit", ["Says this & that."])])
    assert "Says this &amp; that." in render(more)


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_tables(outcome: Outcome, width: int, tmp_path: Path) -> None:
    with (tmp_path / "table").open("w") as stream:
        console = Console(width=width, file=stream)
        console.print(experiment_table(outcome))
        console.print(run_table(made_run(native_tasks(["text_bare"], n=10), "me", lambda t, k, kind: k > 0)))
    printed = (tmp_path / "table").read_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    assert "90.0" in printed
    assert "Wings" in printed
    assert all(len(line) <= width for line in printed.splitlines())
    assert printed.count("+0") >= 1


def test_five_methods_leave_the_captions_last_letters_in_80_columns(outcome: Outcome) -> None:
    one = next(iter(outcome.methods.values()))
    labels = ("full fine-tuning", "full fine-tuning, 10x rate", "LoRA", "Wings", "experts")
    methods = {label: one.model_copy(update={"label": label}) for label in labels}
    table = experiment_table(outcome.model_copy(update={"methods": methods}))
    table.caption = f"{'x' * 76} each"  # 81 letters, and words that end where the table does
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    assert "each" in console.export_text().split()


def test_every_training_must_answer_the_same_tasks(outcome: Outcome) -> None:
    value: Any = copy.deepcopy(outcome.model_dump(mode="json"))
    del value["methods"]["lora"]["seeds"]["1"]["tasks"]["visual"]
    with pytest.raises(ValidationError, match="method 'lora', seed 1: visual not answered"):
        Outcome.model_validate(value)


def test_curve_of_a_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"stage": s, "step": k, "loss": 1.0 / k, "lr": {"llm": 1e-3}} for s in ("align", "tune") for k in range(1, 1001)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = read_curve(path, points=100)
    assert len(curve) == 200
    assert [curve[0].stage, curve[-1].stage] == ["align", "tune"]
    assert curve[0].loss == pytest.approx(np.mean([1 / k for k in range(1, 11)]))
    assert curve[99].step == 1000
    # a run that went on from step 40 wrote the rows after it again
    again = [*rows[:60], *({**row, "loss": 9.0} for row in rows[40:80])]
    path.write_text("".join(json.dumps(row) + "\n" for row in again))
    assert [(point.step, point.loss) for point in read_curve(path)][38:42] == [
        (39, 1 / 39),
        (40, 1 / 40),
        (41, 9),
        (42, 9),
    ]
    path.write_text('{"stage": "a", "step": 1}\n')
    with pytest.raises(EvaluationError, match=r"metrics.jsonl:1: is not a metrics row"):
        read_curve(path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_curve(tmp_path / "missing.jsonl")


def test_wording() -> None:
    gap = "\N{NO-BREAK SPACE}%"
    assert [percent(v) for v in (1.0, 0.9997, 0.975, 1.0004, 0.0)] == [
        f"{v}{gap}" for v in ("100.0", "99.9", "97.5", "100.0", "0.0")
    ]
    assert percent(None) == "n/a"
    assert percent(0.999, 0) == f"99{gap}"
    assert [count(v) for v in (950, 25_300, 5_412_345, 1.2e9)] == ["950", "25.3 k", "5.4 M", "1.2 B"]
    assert [duration(v) for v in (3.21, 42.4, 75, 3725)] == ["3.2 s", "42 s", "1 min 15 s", "1 h 2 min"]
    assert rates({"projector": 1e-3, "llm": 5e-4}) == "projector 1e-3\nllm 5e-4"
    assert rates({"a": 2e-4, "b": 2e-4}) == "2e-4"
    assert rates({}) == "n/a"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert [probability(p) for p in (0.00004, 0.0312, 1.0)] == ["p < 0.001", "p = 0.031", "p = 1"]
    assert bounds(None) == ""


def test_made_up_data_is_reproducible() -> None:
    assert made_outcome(n=10, seeds=(0,), methods=("lora",)) == made_outcome(n=10, seeds=(0,), methods=("lora",))


RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart.json"


def test_of_those_that_keep_the_same_the_one_that_sees_more_is_named() -> None:
    """Wings and experts keep every bare word in this record, and experts see more."""
    page = experiment_report(Outcome.load(RECORD)).replace("\N{NO-BREAK SPACE}", " ")
    assert "Tuned with experts it keeps 100.0" in page
    assert re.search(r"Wings \(by [^)]*experts\)", page)


def test_the_readme_has_the_figures_of_the_record() -> None:
    readme = (RECORD.parents[2] / "README.md").read_text()
    summary = Summary(Outcome.load(RECORD))
    for method, name in zip(
        summary.methods, ("full", "full fine-tuning, 10x", "LoRA", "Wings", "experts"), strict=True
    ):
        row = next(line for line in readme.splitlines() if line.startswith(f"| {name}"))
        kept = [summary.overall(method, task).retention for task in ("text_bare", "text_after_image")]
        seen = summary.overall(method, "visual").tuned.mean.value
        figures = [percent(share.mean.value) for share in kept if share is not None] + [percent(seen)]
        assert [figure.replace("\N{NO-BREAK SPACE}", " ") in row for figure in figures] == [True] * 3
