"""The runs folder's list, whatever its files are called."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from alula.serving.http.runs import Runs


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_one_name_that_is_no_utf8_hides_no_other_report(tmp_path: Path) -> None:
    (tmp_path / "audit.html").write_text("<title>An audit</title>", encoding="utf-8")
    with open(os.fsencode(tmp_path) + b"/old-\xff.html", "wb") as file:
        file.write(b"<title>Old</title>")
    entries = Runs(tmp_path, "/runs/").listed()["entries"]
    assert [entry["path"] for entry in entries] == ["audit.html"]
