#!/usr/bin/env bash
# What alula costs on an accelerator: every benchmark that has a form for one, in under ten minutes on an H200.
#
#   benchmarks/gpu.sh DIRECTORY                           # the records go there; what is there already is gone on with
#   DEVICE=cpu MORE=--shrink benchmarks/gpu.sh DIRECTORY  # the same commands on tiny decoders, anywhere: that they run
#
# Kernels, copies and waits are counted on any machine (benchmarks/launches.py); here they are timed. Nothing else should
# run beside: a step of decoding is bound by how fast one CPU core launches.
set -u
out=${1:?name the directory for the records}
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python}
device=${DEVICE:-cuda}
more=${MORE:-}
failed=0

measure() { # name, seconds, command
  local name=$1 limit=$2 began
  began=$(date +%s)
  shift 2
  # shellcheck disable=SC2086  # none, or several words
  timeout "$limit" "$python" "$@" --device "$device" $more >"$out/$name.log" 2>&1 || { failed=1; echo "$name failed or ran out of time: $out/$name.log"; }
  echo "$name: $(($(date +%s) - began)) s"
}

"$python" - "$device" <<'EOF' || exit
import sys

import torch

print(torch.cuda.get_device_name() if sys.argv[1] == "cuda" else sys.argv[1], torch.__version__)
EOF
for part in prefill-1024 decode train prefill-256; do
  measure "wings-$part" 100 benchmarks/wings.py --only "7b/$part" --rounds 3 --no-memory --output "$out/wings.json"
done
measure probes 80 benchmarks/probes.py --rounds 3 --output "$out/probes.json"
measure experts 80 benchmarks/experts.py --rounds 3 --no-memory --output "$out/experts.json"
for part in decode-static prefill-1024 train; do
  measure "compiled-$part" 150 benchmarks/compiled.py --only "7b/$part" --rounds 3 --output "$out/compiled.json"
done
measure policies 80 benchmarks/policies.py --rounds 3 --output "$out/policies.json"
measure highlight 60 benchmarks/highlight.py --rounds 3 --output "$out/highlight.json"
exit $failed
