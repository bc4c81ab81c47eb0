#!/usr/bin/env bash
# What alula costs on an accelerator: every benchmark that has a form for one, in under ten minutes (LIMIT, in seconds).
#
#   benchmarks/gpu.sh DIRECTORY                           # the records go there; what is there already is gone on with
#   DEVICE=cpu MORE=--shrink benchmarks/gpu.sh DIRECTORY  # the same commands on tiny decoders, anywhere: that they run
#
# Kernels, copies and waits are counted on any machine (benchmarks/launches.py); here they are timed. Nothing else should
# run beside: a step of decoding is bound by how fast one CPU core launches.
set -u
out=${1:?name the directory for the records}
mkdir -p "$out"
out=$(cd "$out" && pwd) || exit
cd "$(dirname "$0")/.." || exit
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python}
device=${DEVICE:-cuda}
more=${MORE:-}
failed=0
began=$(date +%s)

measure() { # name, seconds, command
  local name=$1 limit=$2 start left
  start=$(date +%s)
  left=$((began + ${LIMIT:-590} - start))
  shift 2
  if ((left <= 0)); then
    failed=1
    echo "$name: no time left for it: call again, what is there is gone on with"
    return
  fi
  # shellcheck disable=SC2086  # none, or several words
  timeout $((limit < left ? limit : left)) "$python" "$@" --device "$device" $more >"$out/$name.log" 2>&1 || {
    failed=1
    echo "$name failed or ran out of time: $out/$name.log"
  }
  echo "$name: $(($(date +%s) - start)) s"
}

"$python" - "$device" <<'EOF' || exit
import sys

import torch

print(torch.cuda.get_device_name() if sys.argv[1] == "cuda" else sys.argv[1], torch.__version__)
EOF
for part in prefill-1024 decode train prefill-256; do
  measure "wings-$part" 100 benchmarks/wings.py --only "7b/$part" --rounds 3 --no-memory --output "$out/wings.json"
done
for part in decode-static prefill-1024 train; do
  measure "compiled-$part" 150 benchmarks/compiled.py --only "7b/$part" --rounds 3 --output "$out/compiled.json"
done
measure wings-generate 100 benchmarks/wings.py --only 7b/generate --rounds 1 --no-memory --output "$out/wings.json"
measure probes 80 benchmarks/probes.py --rounds 3 --output "$out/probes.json"
measure policies 80 benchmarks/policies.py --rounds 3 --output "$out/policies.json"
measure experts 80 benchmarks/experts.py --rounds 3 --no-memory --output "$out/experts.json"
measure highlight 60 benchmarks/highlight.py --rounds 3 --output "$out/highlight.json"
exit $failed
