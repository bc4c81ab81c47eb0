#!/usr/bin/env bash
# AdamW, fused on a CPU, trains a parameter wrongly whose rows do not follow each other in memory.
#
# Packages: torch 2.13.0, numpy 2.x (CPU). Seen on 2026-11-29.
# A good guess: `fused=True` computes what AdamW computes; a parameter that is a view (columns of a wider tensor) is a
# parameter like others. Such weights are met: a `pytorch_model.bin` keeps views as views and transformers' `from_pretrained`
# leaves them so, and its Trainer's default optimizer is the fused one.
# What happens: the kernel takes the parameter for one row of memory. Of three rows of four numbers, with four between
# them, the last is not trained, the second moves by the last one's gradient, and what lies between the first two, which is
# no part of the parameter, by the second's. Nothing is said. Unfused, all is well.
# Output seen:
#   rows, between them: unfused -- -- ++, 00 00 00; fused -- ++ 00, -- 00 00
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY'
import torch


def moved(fused):
    whole = torch.ones(3, 8)
    weight = torch.nn.Parameter(whole[:, :4])
    (weight * torch.tensor([[1.0], [1.0], [-1.0]])).sum().backward()
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=fused).step()

    def told(part):
        return " ".join("".join("-0+"[int(step) + 1] for step in (row[[0, -1]] - 1).sign()) for row in part)

    return f"{told(whole[:, :4].detach())}, {told(whole[:, 4:].detach())}"


unfused, fused = moved(False), moved(True)
print(f"rows, between them: unfused {unfused}; fused {fused}")
assert unfused == "-- -- ++, 00 00 00", "changed: unfused"
assert fused == "-- ++ 00, -- 00 00", "changed: fused"
PY
