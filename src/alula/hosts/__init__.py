"""Hosts: transformers models that take images (videos, audio clips), assembled from parts or loaded as they are."""

from alula.hosts.build import build_host
from alula.hosts.custom import CustomTower, trust_tower
from alula.hosts.describe import Description, PartDescription, describe
from alula.hosts.host import Host, load_host, save_host

__all__ = [
    "CustomTower",
    "Description",
    "Host",
    "PartDescription",
    "build_host",
    "describe",
    "load_host",
    "save_host",
    "trust_tower",
]
