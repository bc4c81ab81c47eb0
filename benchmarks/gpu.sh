#!/usr/bin/env bash
# What alula costs on an accelerator: every benchmark that has a form for one, in under ten minutes on an H200.
#
#   benchmarks/gpu.sh DIRECTORY        # the records go there; what is there already is gone on with
#
# Kernels, copies and waits are counted on any machine (benchmarks/launches.py); here they are timed. Nothing else should
# run beside: a step of decoding is bound by how fast one CPU core launches.
set -u
out=${1:?name the directory for the records}
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python}
failed=0

measure() { # name, seconds, command
  local name=$1 limit=$2 began
  began=$(date +%s)
  shift 2
  timeout "$limit" "$python" "$@" >"$out/$name.log" 2>&1 || { failed=1; echo "$name failed or ran out of time: $out/$name.log"; }
  echo "$name: $(($(date +%s) - began)) s"
}

"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' || exit
for part in prefill-1024 decode train prefill-256; do
  measure "wings-$part" 100 benchmarks/wings.py --device cuda --only "7b/$part" --rounds 3 --no-memory --output "$out/wings.json"
done
measure probes 80 benchmarks/probes.py --device cuda --rounds 3 --output "$out/probes.json"
measure experts 80 benchmarks/experts.py --device cuda --rounds 3 --no-memory --output "$out/experts.json"
for part in decode-static prefill-1024 train; do
  measure "compiled-$part" 150 benchmarks/compiled.py --device cuda --only "7b/$part" --rounds 3 --output "$out/compiled.json"
done
measure policies 80 benchmarks/policies.py --device cuda --rounds 3 --output "$out/policies.json"
measure highlight 60 benchmarks/highlight.py --device cuda --rounds 3 --output "$out/highlight.json"
exit $failed
