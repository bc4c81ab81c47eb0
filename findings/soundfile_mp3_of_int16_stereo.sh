#!/usr/bin/env bash
# soundfile (libsndfile): stereo samples of int16 written as MP3 come back as another sound; as float they are right.
#
# Packages: soundfile 0.14.0 (its wheel brings libsndfile 1.2.2), numpy 2.4.6. Seen on 2026-11-28.
# A good guess: int16 is what WAV holds and what audio datasets hand out, and `soundfile.write` takes it for every format; a
# lossy codec changes a pure tone by a hundredth.
# What happens: mono int16 and stereo float are written well. Stereo int16 is not: half of every block is not the tone, without
# an error or a warning, and nothing in the file tells. Copies of a set made this way for training are spoiled in silence.
# (libsndfile's pull request 1106, open, names the line.)
# Output seen:
#   largest error of a tone of 0.5: mono int16 0.01, stereo float64 0.02, stereo int16 1.0 or more
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q soundfile==0.14.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
import soundfile

rate = 16000
tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
whole = (tone * 32767).astype(np.int16)


def error(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="MP3")
    file.seek(0)
    read, _ = soundfile.read(file, always_2d=True)
    # the first and last frames ring
    return float(np.abs(read[: len(tone)] - tone[:, None])[2000:-2000].max())


mono, floats, stereo = error(whole), error(np.stack([tone, tone], 1)), error(np.stack([whole, whole], 1))
said = "1.0 or more" if stereo >= 1 else f"{stereo:.2f}"
print(f"largest error of a tone of 0.5: mono int16 {mono:.2f}, stereo float64 {floats:.2f}, stereo int16 {said}")
assert max(mono, floats) < 0.1 and stereo > 0.3, "changed"
PY
