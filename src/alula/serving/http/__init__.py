"""A server of OpenAI's API over an `alula.serving.engine.Engine`, with what only alula has beside it."""

from alula.serving.http.app import application
from alula.serving.http.connections import Connections
from alula.serving.http.lineup import Entry, adapter_name, lineup
from alula.serving.http.samples import offered
from alula.serving.http.server import listen, serve
from alula.serving.http.settings import Settings

__all__ = ["Connections", "Entry", "Settings", "adapter_name", "application", "lineup", "listen", "offered", "serve"]
