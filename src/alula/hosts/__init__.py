"""Hosts: transformers models that take images (videos, audio clips), assembled from parts or loaded as they are."""

from alula.hosts.build import build_host
from alula.hosts.describe import Description, PartDescription, describe
from alula.hosts.host import Host, load_host, save_host

__all__ = ["Host", "build_host", "load_host", "save_host", "describe", "Description", "PartDescription"]
