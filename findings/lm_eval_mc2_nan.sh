#!/usr/bin/env bash
# lm-eval's truthfulqa_mc2: one item whose choices are all unlikely makes the score of the whole task NaN.
#
# Packages: lm-eval 0.4.13 (CPU). Seen on 2026-11-27.
# A good guess: the share of probability on the true choices is a softmax of their log-likelihoods, which are finite.
# What happens: the log-likelihoods, each a sum over a choice's tokens, are put through `exp` as they are. Below -745 all
# are 0, the share is 0/0, and the mean over the task is NaN; a RuntimeWarning of numpy is the only sign. Such sums are
# those of long choices (200 tokens at 5 nats), or of a checkpoint that has lost its skills, which is when one measures.
# Output seen:
#   shares 0.731, nan, 0.269; task nan; the second item as a softmax 0.731
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q lm_eval==0.4.13
cd "$work" && HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log <<'PY' || { cat log >&2; exit 1; }
import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.tasks.truthfulqa.utils import process_results_mc2

doc = {"mc2_targets": {"labels": [1, 0]}}  # the first choice is true, the second is not
items = [[-12.0, -13.0], [-1000.0, -1001.0], [-20.0, -19.0]]
shares = [float(process_results_mc2(doc, [(likelihood, False) for likelihood in item])["acc"]) for item in items]
task = mean(shares)
softmax = float(1 / (1 + np.exp(items[1][1] - items[1][0])))
print("shares {:.3f}, {:.3f}, {:.3f}; task {:.3f}; the second item as a softmax {:.3f}".format(*shares, task, softmax))
assert np.isnan(shares).tolist() == [False, True, False] and np.isnan(task) and abs(softmax - shares[0]) < 1e-6, "changed"
PY
