#!/usr/bin/env bash
# OpenEXR (Python): an array that is a view (one channel of several, a flip, a transpose) is written as other numbers.
#
# Packages: OpenEXR 3.5.3, numpy 2.4.6. Seen on 2026-11-28.
# A good guess: `OpenEXR.File(header, {"Z": rgbd[..., 3]})` writes the fourth channel: the array knows its strides, and every
# writer of the field (Pillow, tifffile, numpy.save) honours them or refuses.
# What happens: the file holds the memory behind the view as if it were contiguous: values of the other channels, and for a
# flip, whose first byte is the last row, what lies behind the array. No error, no warning, and the file opens. A depth
# channel cut out of an RGBD array is spoiled in silence; numpy.ascontiguousarray before writing is the way round.
# Output seen:
#   right values of 48: contiguous 48, one channel of four 1, transposed 2
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q OpenEXR==3.5.3 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import numpy as np
import OpenEXR

path = f"{sys.argv[1]}/depth.exr"


def right(array):
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    with OpenEXR.File(header, {"Z": array}) as file:
        file.write(path)
    with OpenEXR.File(path, separate_channels=True) as file:
        return int((file.channels()["Z"].pixels == array).sum())


rgbd = np.arange(192, dtype=np.float32).reshape(6, 8, 4)
whole = right(np.ascontiguousarray(rgbd[..., 3]))
view, turned = right(rgbd[..., 3]), right(np.arange(48, dtype=np.float32).reshape(8, 6).T)
print(f"right values of 48: contiguous {whole}, one channel of four {view}, transposed {turned}")
assert whole == 48 and view < 48 and turned < 48, "changed"
PY
