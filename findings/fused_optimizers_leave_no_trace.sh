#!/usr/bin/env bash
# Fused optimizers change parameters without counting it, so autograd does not notice that what it saved is gone.
#
# Packages: torch 2.13.0, numpy 2.x (CPU). Seen on 2026-11-29.
# A good guess: whatever changes a tensor in place raises its version, and a backward through a value that was changed
# since is refused ("modified by an inplace operation"): it is what autograd's check is there for, and what libraries go by
# that keep something made of the weights (merged, stacked, quantized) until these change.
# What happens: with `fused=True` Adam, AdamW, SGD and Adagrad change the parameter and leave its version as it was. A loss
# that was made before the step can be gone through backwards after it, and its gradient is that of the new weights; not
# fused, the same program is stopped by an error. AdamW fused is the default of transformers' Trainer.
# Output seen:
#   versions raised by a step, and d(w * w)/dw at w = 1 after it (2.0 is right):
#   Adam      foreach 1 refused   fused 0 0.2
#   AdamW     foreach 1 refused   fused 0 0.2
#   SGD       foreach 1 refused   fused 0 0.2
#   Adagrad   plain   1 refused   fused 0 0.2
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY'
import torch


def told(name, lr, **how):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = getattr(torch.optim, name)([weight], lr=lr, **how)
    loss = weight * weight
    weight.grad = torch.ones(())
    before = weight._version
    optimizer.step()
    raised = weight._version - before
    assert abs(weight.item() - 0.1) < 0.02, "changed: the step"
    weight.grad = None
    try:
        loss.backward()
    except RuntimeError as error:
        assert "inplace operation" in str(error)
        return f"{int(raised > 0)} refused"
    return f"{int(raised > 0)} {weight.grad.item():.1f}"


print("versions raised by a step, and d(w * w)/dw at w = 1 after it (2.0 is right):")
for name in ("Adam", "AdamW", "SGD", "Adagrad"):
    label, plain = ("plain", {"foreach": False}) if name == "Adagrad" else ("foreach", {"foreach": True})
    one, other = told(name, 0.9, **plain), told(name, 0.9, fused=True)
    print(f"{name:9} {label:7} {one}   fused {other}")
    assert one == "1 refused", f"changed: {name}, not fused"
    assert other == "0 0.2", f"changed: {name}, fused"
PY
