#!/usr/bin/env bash
# lm-eval's truthfulqa_mc1: a model to which all answers are equally likely is told to be right in every item.
#
# Packages: lm-eval 0.4.13 (CPU). Seen on 2026-11-28.
# A good guess: who cannot tell true answers from false ones scores as chance, one in as many as there are choices.
# What happens: the true answer stands first in every item (`doc_to_target: 0`), and the likeliest choice is the first of
# the highest (`argmax`), so a tie is right. Choices tie where all log-likelihoods are -inf or saturate in half precision,
# or where the same tokens are scored for all of them. Tasks whose answers stand anywhere show chance then; this one 100 %.
# Output seen:
#   equal likelihoods: right in 4 of 4; the true answer 1 unit ahead: 4 of 4; behind: 0 of 4; -inf everywhere: 4 of 4
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q lm_eval==0.4.13
cd "$work" && HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log <<'PY' || { cat log >&2; exit 1; }
import json
from pathlib import Path

import lm_eval.tasks.truthfulqa
import yaml
from lm_eval.api.task import ConfigurableTask

items = [{"question": f"What is {n}?", "mc1_targets": {"choices": ["a number", "a letter", "a fish"], "labels": [1, 0, 0]}}
         for n in "1234"]
Path("items.jsonl").write_text("\n".join(map(json.dumps, items)))
# the task as it is published, over these items in place of the hub's
published = Path(next(iter(lm_eval.tasks.truthfulqa.__path__)), "truthfulqa_mc1.yaml")
config = yaml.safe_load(published.read_text())
del config["tag"], config["dataset_name"]
config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(Path("items.jsonl").resolve())}}}
task = ConfigurableTask(config=config)


def right(*likelihoods):
    answers = [(each, False) for each in likelihoods]
    return int(sum(task.process_results(doc, answers)["acc"] for doc in task.validation_docs()))


seen = right(-3.0, -3.0, -3.0), right(-3.0, -4.0, -4.0), right(-4.0, -3.0, -3.0), right(*[float("-inf")] * 3)
print("equal likelihoods: right in {} of 4; the true answer 1 unit ahead: {} of 4; behind: {} of 4; -inf everywhere: "
      "{} of 4".format(*seen))
assert seen == (4, 4, 0, 4), "changed"
PY
