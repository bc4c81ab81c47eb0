"""``python -m studies``: questions answered by training many small models, each study resumable and parallel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alula.bounds import MAX_ITEMS
from alula.cli.app import run as run_command_line
from alula.cli.command import command_line

Output = Annotated[Path, typer.Option(help="Directory for everything it writes; a second call goes on there.")]
Seeds = Annotated[str, typer.Option(help="Training seeds, comma separated; each repeats all trainings.")]
Arms = Annotated[str, typer.Option(help="Comma separated names of arms, or all. More may join in a later call.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes side by side; default: one per core. 0: none but this one.")
]
Steps = Annotated[float, typer.Option(min=0.001, help="Factor on all numbers of training steps, for a quick look.")]
Reuse = Annotated[
    Path | None, typer.Option(help="Directory of a quickstart whose trainings are taken instead of done again.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")]


def commands() -> typer.Typer:
    """The studies as commands."""
    app = typer.Typer(
        name="studies",
        help="Answer a research question by training and measuring many small models.",
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.command(name="attention-shift")(attention_shift)
    app.command(name="wings")(wings)
    app.command(name="frontier")(frontier)
    app.command(name="early-warning")(early_warning)
    app.command(name="alignment")(alignment)
    app.command(name="policies")(policies)
    app.command(name="highlight")(highlight)
    app.command(name="subnetwork")(subnetwork)
    app.command(name="demonstrations")(demonstrations)
    app.command(name="browse")(browse)
    app.command(name="tokens")(tokens)
    app.command(name="truthfulness")(truthfulness)
    app.command(name="visual-knowledge")(visual_knowledge)
    app.command(name="universal")(universal)
    app.command(name="real")(real)
    return app


def attention_shift(
    output: Output = Path("runs/attention-shift"),
    seeds: Seeds = "0",
    texts: Annotated[str, typer.Option(help="Shares of text among the training samples.")] = "0,0.1,0.25,0.5",
    rates: Annotated[str, typer.Option(help="Learning rates.")] = "1e-3,3e-3,1e-2",
    items: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Questions per task and model.")] = 200,
    samples: Annotated[int, typer.Option(min=2, max=MAX_ITEMS, help="Samples the attention is measured on.")] = 64,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Does attention shift say how well a tuned model still reads?

    Trains a population by full fine-tuning (text shares x learning rates x seeds), measures each model's attention
    shift and text accuracy at four checkpoints, and correlates the two. Ends with a table, a verdict and a report.
    """
    import studies.attention_shift as study

    plan = study.ShiftPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        texts=_numbers(texts, "--texts", float),
        rates=_numbers(rates, "--rates", float),
        items=items,
        samples=samples,
        steps=steps,
        reuse=reuse,
    )
    record = study.attention_shift(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def wings(
    output: Output = Path("runs/wings"),
    seeds: Seeds = "0,1,2",
    arms: Arms = "all",
    items: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Questions per task.")] = 400,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """What in Wings keeps the words?

    Tunes one base in many ways at matched learning rates (and the published mismatch): full tuning, LoRA, prefix, text
    replay, and Wings with its learners, router, gate, rank and decoder varied one at a time. All answer the same
    questions. Ends with a table, an answer per question, a report, and the tables in Markdown (tables.md).
    """
    import studies.arms as study
    from studies.wings import WINGS, WingsPlan

    plan = WingsPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        arms=_arms(arms),
        items=items,
        steps=steps,
        reuse=reuse,
    )
    outcome = study.run(plan, command=command_line(), workers=workers)
    _show(output, outcome, study, as_json=as_json, of=(WINGS,))


def frontier(
    output: Output = Path("runs/frontier"),
    seeds: Seeds = "0,1,2",
    arms: Arms = "all",
    items: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Questions per task.")] = 400,
    rounds: Annotated[
        int, typer.Option(min=0, help="Rounds in which training times are measured beside full tuning's.")
    ] = 3,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Which way of giving a decoder eyes keeps every word and sees as well as full tuning?

    Tunes one base by full tuning, LoRA, text replay, Wings, experts and what holds them to the base's words, at matched
    rates on the same pictures. Ends with a table, an answer per question, which arm meets the aim, a report, and the
    tables in Markdown (tables.md).
    """
    import studies.frontier as study
    from studies.frontier import report

    plan = study.FrontierPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        arms=_arms(arms),
        items=items,
        rounds=rounds,
        steps=steps,
        reuse=reuse,
    )
    outcome = study.frontier(plan, command=command_line(), workers=workers)
    _show(output, outcome, report, as_json=as_json)


def early_warning(
    output: Annotated[Path, typer.Option(help="Directory of the record and the report.")] = Path("runs/early-warning"),
    population: Annotated[
        Path,
        typer.Option(help="Directory of the attention-shift study; its trainings are read, missing ones are done."),
    ] = Path("runs/attention-shift"),
    seeds: Seeds = "0",
    budget: Annotated[
        float, typer.Option(help="A training has failed that ends below this share of the base's text accuracy.")
    ] = 0.9,
    workers: Workers = None,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Do the probes tell early that text will be lost?

    Reads what the retention monitor wrote down while the attention-shift study's population trained, and judges each
    signal (probes, text itself, the learning rate alone) by how early and how surely it tells the trainings that end
    below the budget from the others. Ends with a table, a verdict and a report.
    """
    import studies.early_warning as study

    plan = study.WarningPlan.over(output, population, seeds=_numbers(seeds, "--seeds", int), reuse=reuse, budget=budget)
    record = study.early_warning(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def alignment(
    output: Output = Path("runs/alignment"),
    seeds: Seeds = "0,1,2",
    configurations: Annotated[
        str, typer.Option(help="Comma separated names of tower and connector configurations, or all.")
    ] = "all",
    samples: Annotated[int, typer.Option(min=4, max=MAX_ITEMS, help="Captioned pictures the probes see.")] = 128,
    items: Annotated[
        int, typer.Option(min=3, max=MAX_ITEMS, help="Visual and POPE questions; a third as many descriptions.")
    ] = 240,
    workers: Workers = None,
    steps: Steps = 1.0,
    as_json: AsJson = False,
) -> None:
    """What does implicit alignment of images with text say of a model?

    Trains connectors of several kinds to several towers (and one decoder with them), measures alignment, geometry and
    overlap of weights on the way, and asks: do image tokens differ from text tokens, do both use the same weights, does
    alignment rise inside blocks, does the IMA score go with skill, does it go against hallucination (POPE, CHAIR).
    """
    import studies.alignment as study

    every = tuple(configuration.name for configuration in study.CONFIGURATIONS)
    plan = study.AlignmentPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        configurations=every if configurations == "all" else tuple(configurations.split(",")),
        samples=samples,
        items=items,
        steps=steps,
    )
    record = study.alignment(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def policies(
    output: Output = Path("runs/policies"),
    seeds: Seeds = "0,1,2",
    parts: Annotated[
        str,
        typer.Option(
            help="Comma separated: shares, layers, withdrawal, skips, turns, pictures, text; or all. More may join in "
            "a later call."
        ),
    ] = "all",
    criteria: Annotated[str, typer.Option(help="Comma separated names of ways to prune, or all.")] = "all",
    items: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Questions about one picture, per kind.")] = 40,
    pairs: Annotated[
        int, typer.Option(min=1, max=MAX_ITEMS, help="Pictures about which two questions are asked.")
    ] = 60,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Do policies keep answers?

    Asks fully tuned models the same questions under every policy: all pruning criteria at four shares beside
    down-sampling, grid and chance, withdrawal and skipping by layer, conversations, text alone. Ends with a table, a
    verdict per published claim, a report, and the tables in Markdown (tables.md).
    """
    import studies.policies as study

    plan = study.PoliciesPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        parts=_arms(parts) or study.PARTS,
        ways=_arms(criteria),
        items=items,
        pairs=pairs,
        steps=steps,
        reuse=reuse,
    )
    record = study.policies(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def highlight(
    output: Output = Path("runs/highlight"),
    seeds: Seeds = "0",
    arms: Arms = "all",
    items: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Questions of every kind.")] = 100,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Does the answer follow the highlight?

    Points at things in pictures, asks fully tuned models of a quickstart (--reuse) about them under Prompt
    Highlighter at every strength and guidance and under its rivals, and looks at what it costs in truth, hallucination
    and fluency. Ends with a table, a verdict, a report, and the tables in Markdown (tables.md).
    """
    import studies.highlight as study

    plan = study.HighlightPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        arms=_arms(arms),
        items=items,
        steps=steps,
        reuse=reuse,
    )
    record = study.highlight(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def browse(
    output: Output = Path("runs/browse"),
    seeds: Seeds = "0,1,2",
    queries: Annotated[
        int,
        typer.Option(
            min=0, max=64, help="Make hosts that see so many tokens of a picture, by queries; 0: the lent models."
        ),
    ] = 0,
    training: Annotated[int, typer.Option(min=2, help="Optimizer steps of every arm.")] = 150,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Learning rate of the condition's map. (default: the recipe's)")
    ] = None,
    items: Annotated[
        int, typer.Option(min=4, max=MAX_ITEMS, help="Questions about several pictures; a quarter as many about one.")
    ] = 200,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Does reading everything once help to look?

    Tunes fully tuned models on with questions that one picture cannot answer: as they are, with browse-and-concentrate,
    and with it in its two stages, all for the same steps on the same data. Asks each when the connector is told its own
    prompt's condition, none, and another question's. Ends with a table, a verdict, a report, and the tables in Markdown
    (tables.md).
    """
    import studies.browse as study

    plan = study.BrowsePlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        queries=queries,
        tuning_steps=training,
        rate=rate,
        items=items,
        steps=steps,
        reuse=reuse,
    )
    record = study.browse(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def tokens(
    output: Output = Path("runs/tokens"),
    seeds: Seeds = "0,1,2",
    arms: Arms = "all",
    training: Annotated[int, typer.Option(min=2, help="Optimizer steps of every arm, both stages together.")] = 280,
    items: Annotated[int, typer.Option(min=8, max=MAX_ITEMS, help="Held-out captions and their pictures.")] = 48,
    workers: Workers = None,
    steps: Steps = 1.0,
    as_json: AsJson = False,
) -> None:
    """Which codes can be read, and which can be drawn?

    Puts codes of pictures behind the fledgling's vocabulary: by k-means of its tower, k-means of an untrained tower and
    VQ autoencoders, of several sizes, and by one tokenizer to read and another to write; and codes of sounds. Trains
    all alike. Asks how much an item's codes tell of its caption, and whether pictures and sounds made from captions
    show what was asked, by the fledgling's own tower and ears. Ends with a table, a verdict, a report, and the tables
    in Markdown (tables.md).
    """
    import studies.tokens as study
    from alula.errors import UsageError
    from studies.tokens.plan import ARMS

    chosen = tuple(ARMS) if arms == "all" else tuple(each.strip() for each in arms.split(","))
    unknown = next((each for each in chosen if each not in ARMS), None)
    if unknown is not None:
        raise UsageError(f"no arm {unknown!r}", where="--arms", remedy=f"take some of {', '.join(ARMS)}")
    plan = study.TokensPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        steps=steps,
        arms=chosen,
        training=training,
        items=items,
    )
    record = study.tokens(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def subnetwork(
    output: Output = Path("runs/subnetwork"),
    seeds: Seeds = "0,1,2",
    parts: Annotated[
        str, typer.Option(help="Comma separated: masks, healing, kinds; or all. More may join in a later call.")
    ] = "all",
    sparsities: Annotated[
        str, typer.Option(help="Shares of weights that become zero. More may join in a later call.")
    ] = "0.3,0.5,0.6,0.7",
    healed: Annotated[float, typer.Option(help="The sparsity that is healed.")] = 0.7,
    samples: Annotated[int, typer.Option(min=2, max=MAX_ITEMS, help="Of each stream, to calibrate on.")] = 32,
    items: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Questions per skill.")] = 160,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Do pictures and words use one subnetwork?

    Prunes fully tuned models by masks of image tokens, of text, of both, with the published code's padding, by
    magnitude and chance: what masks share, which skill dies first, whether one mask serves several tasks (masks), what
    healing forgets (healing); and models that take films and sounds, too, by masks of four kinds (kinds). Ends with a
    table, a verdict per question, a report, and the tables in Markdown (tables.md).
    """
    import studies.subnetwork as study

    plan = study.SubnetworkPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        parts=_arms(parts) or study.PARTS,
        sparsities=_numbers(sparsities, "--sparsities", float),
        healed=healed,
        samples=samples,
        items=items,
        steps=steps,
        reuse=reuse,
    )
    record = study.subnetwork(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def demonstrations(
    output: Output = Path("runs/demonstrations"),
    seeds: Seeds = "0,1,2",
    items: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Held-out episodes that are asked.")] = 32,
    taught: Annotated[int, typer.Option(min=1, help="Steps in which a host learns to read demonstrations.")] = 40,
    mapped: Annotated[int, typer.Option(min=1, help="Steps in which AIM's map is trained.")] = 240,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """What is left of a demonstration without its picture?

    Teaches fully tuned models to read demonstrations (episodes of the microworld), trains AIM's map on the frozen
    host, and asks held-out episodes behind 0 to 64 shots: in full, pruned, in words alone, and as fused tokens. Ends
    with a table, a verdict, a report, and the tables in Markdown (tables.md).
    """
    import studies.demonstrations as study

    plan = study.DemonstrationsPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        items=items,
        taught=taught,
        mapped=mapped,
        steps=steps,
        reuse=reuse,
    )
    record = study.demonstrations(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def universal(
    output: Output = Path("runs/universal-study"),
    seeds: Seeds = "0,1,2",
    images: Annotated[int, typer.Option(min=1, help="Optimizer steps on pictures alone.")] = 150,
    training: Annotated[int, typer.Option(min=3, help="Optimizer steps of every arm.")] = 120,
    items: Annotated[int, typer.Option(min=2, max=MAX_ITEMS, help="Held-out captions of each medium.")] = 64,
    senses: Annotated[
        bool,
        typer.Option("--senses", help="Points; then depth, normals, motion, responses, in place of films and sounds."),
    ] = False,
    workers: Workers = None,
    steps: Steps = 1.0,
    as_json: AsJson = False,
) -> None:
    """One encoder for all media: what of OneLLM's ablations holds here?

    Aligns a host with pictures, then with films and sounds beside them: jointly or each by itself, experts copied or
    from random weights, one, three or five of them, under every router, with the encoder frozen or tuned. Measures how
    well held-out captions are told behind their own item and behind another's. Ends with a table, a verdict per claim,
    a report, and the tables in Markdown (tables.md).
    """
    import studies.universal as study

    plan = study.UniversalPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        images=images,
        training=training,
        items=items,
        senses=senses,
        steps=steps,
    )
    record = study.universal(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def truthfulness(
    output: Output = Path("runs/truthfulness"),
    seeds: Seeds = "0,1,2",
    arms: Arms = "all",
    items: Annotated[int, typer.Option(min=2, max=MAX_ITEMS, help="Questions per task.")] = 120,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Does learning from pictures make a model more truthful, and more ethical?

    Tunes one base on the same conversations with their pictures and on the words alone, by full tuning, LoRA, and LoRA
    with embeddings and head, on all kinds and by kind; weighs what every model holds true and right in the microworld,
    with what answer habits alone would score. Ends with a table, a verdict per claim, a report, and tables.md.
    """
    import studies.truthfulness as study

    plan = study.TruthPlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        arms=_arms(arms),
        items=items,
        steps=steps,
        reuse=reuse,
    )
    record = study.truthfulness(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def visual_knowledge(
    output: Output = Path("runs/visual-knowledge"),
    seeds: Seeds = "0,1,2",
    arms: Arms = "all",
    items: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Questions of the old text skills.")] = 80,
    workers: Workers = None,
    steps: Steps = 1.0,
    reuse: Reuse = None,
    as_json: AsJson = False,
) -> None:
    """Does stored sight help words?

    Shows named things in pictures whose captions tell nothing of their looks, by MKS2, MKS2 without its parts, LoRA,
    full tuning and Wings, and asks about them in words, before and after. Ends with a table, a verdict, a report, and
    the tables in Markdown (tables.md).
    """
    import studies.visual_knowledge as study

    plan = study.KnowledgePlan(
        output=output,
        seeds=_numbers(seeds, "--seeds", int),
        arms=_arms(arms),
        items=items,
        steps=steps,
        reuse=reuse,
    )
    record = study.visual_knowledge(plan, command=command_line(), workers=workers)
    _show(output, record, study, as_json=as_json)


def real(
    weights: Annotated[Path, typer.Option("--real", help="Directory that `alula real prepare` made.")],
    benchmarks: Annotated[
        Path, typer.Option(help="Your copies: blimp.zip, coda_colours.jsonl, coda_objects.jsonl, gsm8k_test.jsonl.")
    ],
    output: Output = Path("runs/real"),
    seeds: Seeds = "0",
    arms: Arms = "all",
    training: Annotated[int, typer.Option(min=2, help="Optimizer steps of every way.")] = 48,
    align: Annotated[int, typer.Option(min=1, help="Optimizer steps of the connector before.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    items: Annotated[
        int,
        typer.Option(min=1, max=MAX_ITEMS, help="Pairs of each paradigm of BLiMP; other counts are multiples of it."),
    ] = 10,
    precision: Annotated[str, typer.Option(help="bf16 (autocast over float32 weights) or fp32.")] = "bf16",
    beside: Annotated[
        Path | None, typer.Option(help="Record of the alignment study, to stand beside what probes see.")
    ] = None,
    join: Annotated[
        Path | None,
        typer.Option(help="Record of other seeds of the same settings, made elsewhere: told together."),
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """A real language model, real pictures: what does each way cost in words?

    Aligns SmolLM2-135M-Instruct with an ImageNet net, tunes it by connector alone, full tuning, LoRA, Wings, text
    replay and MKS2 at equal data, steps and rates, and measures BLiMP, CoDa, GSM8K and chat formats, held-out pictures,
    divergence and what probes see. Ends with a table, a verdict, a report, and the tables in Markdown (tables.md).
    """
    import studies.real as study
    from alula.errors import UsageError
    from studies.alignment.record import AlignmentRecord

    if precision not in ("bf16", "fp32"):
        raise UsageError(f"--precision {precision!r} is neither bf16 nor fp32")
    plan = study.RealPlan(
        output=output,
        real=weights,
        benchmarks=benchmarks,
        seeds=_numbers(seeds, "--seeds", int),
        arms=_arms(arms),
        training=training,
        align=align,
        batch=batch,
        items=items,
        precision="bf16" if precision == "bf16" else "fp32",
    )
    other = None if beside is None else AlignmentRecord.load(beside)
    record = study.real(plan, command=command_line(), join=join, workers=workers)
    _show(output, record, study, as_json=as_json, beside=(other,))


def _arms(text: str) -> tuple[str, ...]:
    """The named arms, parts or criteria; none for all."""
    return () if text == "all" else tuple(name.strip() for name in text.split(","))


def _numbers(text: str, option: str, kind: Any) -> tuple[Any, ...]:
    from alula.errors import UsageError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is not a list of numbers", remedy="separate them by commas, e.g. 0,1,2"
        ) from None


def _show(
    output: Path, record: Any, study: Any, *, as_json: bool, of: tuple[Any, ...] = (), beside: tuple[Any, ...] = ()
) -> None:
    """Write a study's report, its figures and, where docs show them, its tables; tell table and verdict.

    Args:
        study: has ``report``, ``figures``, ``table``, ``verdict`` and perhaps ``markdown``.
        of: what these are given before the record.
        beside: what ``report`` and ``markdown`` are given behind it.
    """
    from rich.console import Console

    from alula.files import write_text
    from studies.pages import write_pages

    if hasattr(study, "markdown"):
        write_text(output / "tables.md", study.markdown(*of, record, *beside))
    page = write_pages(output, study.report(*of, record, *beside), study.figures(*of, record))
    if as_json:
        typer.echo(record.model_dump_json())
        return
    console = Console()
    console.print(study.table(*of, record))
    for sentence in study.verdict(*of, record):
        console.print(sentence, highlight=False)
    typer.echo(f"report: {page}")
    typer.echo(f"record: {output / 'outcome.json'}")


if __name__ == "__main__":
    run_command_line(commands)
