#!/usr/bin/env bash
# pypcd4: colors packed as float, the layout it makes itself, are all black once saved as ASCII.
#
# Packages: pypcd4 1.5.1, numpy 2.4.6. Seen on 2026-11-28.
# A good guess: `PointCloud.from_xyzrgb_points` with `encode_rgb` makes a cloud with colors, and `save` keeps it in every
# encoding it offers; binary and binary_compressed do.
# What happens: ASCII is written with ten decimals, and packed colors are floats of 1e-38: "0.0000000000". The cloud is read
# back without an error, with its places and with every color 0. (Point Cloud Library writes ASCII with significant digits.)
# Output seen:
#   red that was 200 comes back as: binary 200, binary_compressed 200, ascii 0
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pypcd4==1.5.1 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
from pypcd4 import Encoding, PointCloud

packed = PointCloud.encode_rgb(np.array([[200, 100, 50]], np.uint8))
cloud = PointCloud.from_xyzrgb_points(np.array([[1.0, 2.0, 3.0, packed[0]]], np.float32))


def red(encoding):
    file = io.BytesIO()
    cloud.save(file, encoding=encoding)
    file.seek(0)
    return int(PointCloud.decode_rgb(PointCloud.from_fileobj(file).pc_data["rgb"])[0][0])


found = {name: red(Encoding(name)) for name in ("binary", "binary_compressed", "ascii")}
print("red that was 200 comes back as: " + ", ".join(f"{name} {value}" for name, value in found.items()))
assert found == {"binary": 200, "binary_compressed": 200, "ascii": 0}, "changed"
PY
