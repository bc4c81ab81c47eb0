"""Browse and concentrate: all images and words are read once before every image is encoded knowing what was read."""

from alula.grafts.browse.config import BrowseConfig
from alula.grafts.browse.graft import BrowseGraft
from alula.grafts.browse.reading import read_conditions
from alula.grafts.registry import register

register(BrowseConfig, BrowseGraft)

__all__ = ["BrowseConfig", "BrowseGraft", "read_conditions"]
