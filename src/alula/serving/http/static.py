"""The page's files, and nothing else of its folder."""

from __future__ import annotations

import os
from pathlib import PurePath

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from alula.serving.page import FOLDER

_KINDS = (".html", ".css", ".js", ".svg", ".png", ".ico", ".woff2", ".webmanifest")


class _Files(StaticFiles):
    """Files of the page."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        if path not in ("", ".") and PurePath(path).suffix not in _KINDS:
            return "", None
        return super().lookup_path(path)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"  # asked for again, and answered 304 where nothing changed
        return response


def page() -> StaticFiles:
    """The application at ``/``."""
    return _Files(directory=FOLDER, html=True)
