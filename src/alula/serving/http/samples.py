"""What the page offers to ask, as JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from alula.serving.demo import Sample


def offered(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Samples with their pictures as PNG in ``data:`` addresses."""
    return [
        {
            "title": sample.title,
            "text": sample.text,
            "media": [{"type": "image", "url": _address(image)} for image in sample.images],
        }
        for sample in samples
    ]


def _address(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
