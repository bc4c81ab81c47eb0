"""The model card beside a fledgling's weights, written from its card."""

from __future__ import annotations

from typing import Any

_TEXT = """\
---
license: apache-2.0
library_name: transformers
tags: [alula, fledgling, microworld]
---

# fledgling

A tiny language model (`llm/`, stock `{llm[class]}`, {llm_parameters} parameters, with tokenizer and chat
template) and a tiny vision tower (`vision/`, stock `{tower[class]}`, {tower_parameters} parameters,
{image_size} x {image_size} pixels in 25 patches), raised from nothing on alula's microworld. They exist so that
every claim about keeping and gaining skills can be checked offline in minutes, on real architectures and through the
same code as a large model. They know the microworld and nothing else.

Raised by `{command}` (seed {upbringing[seed]}) in {minutes:.1f} minutes on {machine[device]},
{machine[threads]} threads, {machine[precision]} products (weights float32), torch {machine[torch]},
transformers {machine[transformers]}.

## Text: accuracy on held-out items

Greedy answers, exact match, {items} items per family. *After words*: 16 to 36 unrelated words stand before the
question.
*After foreign rows*: an earlier turn holds 25 rows that are no word's embedding and a question about a picture.

{text_table}

## Tower: what can be read off its rows

Accuracy of linear probes on the penultimate layer's patch rows, on held-out scenes and on combinations of colour and
shape that were never in any training picture.

{probe_table}

## Taught

Ten families of text skill as turns of mixed dialogues, a third of the questions after unrelated material; answers are
learned, prompts are not. The tower saw pictures with captions (contrastive) and was told what is centred in each patch.
What the families are and what is held out of each: `docs/concepts/microworld.md`.
"""


def model_card(card: dict[str, Any]) -> str:
    """README.md of a fledgling, as Markdown."""
    text = card["text"]
    conditions = list(text)
    families = list(text[conditions[0]]["families"])
    rows = [["family", *conditions]]
    rows += [[family, *(f"{text[c]['families'][family]:.1%}" for c in conditions)] for family in families]
    rows.append(["**mean**", *(f"**{text[c]['mean']:.1%}**" for c in conditions)])
    probes = card["tower_probe"]
    attributes = list(probes["test"])
    probe_rows = [["attribute", *probes]] + [[name, *(f"{probes[s][name]:.1%}" for s in probes)] for name in attributes]
    return _TEXT.format(
        **card,
        llm_parameters=f"{card['llm']['parameters']:,}",
        tower_parameters=f"{card['tower']['parameters']:,}",
        image_size=card["tower"]["image_size"],
        minutes=card["seconds"]["total"] / 60,
        items=text[conditions[0]]["items_per_family"],
        text_table=_table(rows),
        probe_table=_table(probe_rows),
    )


def _table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([head, rule, *body])
