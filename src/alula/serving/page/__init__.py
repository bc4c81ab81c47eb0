"""The page that `alula serve` shows at ``/``: static files, read by the browser as they are.

No build step, nothing from the net, no inline script or style, so that it runs under a content security policy that
allows neither: what a model writes can then never run. The server mounts `FOLDER`; it holds no secrets and needs no
token. What the page asks of the server is documented in ``docs/usage/serve.md``.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""directory with ``index.html``"""

__all__ = ["FOLDER"]
