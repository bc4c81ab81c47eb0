"""The fledgling: a tiny language model with eyes and ears, the world it was raised on, and a quickstart with it.

A distribution of its own, so that users of other models install none of it. It plugs into alula by entry points: the
model ``fledgling``, the sources ``microworld`` and ``digits``, tasks over them, and the commands ``alula quickstart``,
``alula fledgling`` and ``alula data export``.
"""

from alula_fledgling.weights import NAME, PARTS, card, digest, directory, part_directory

__version__ = "0.1.0"

__all__ = ["NAME", "PARTS", "card", "digest", "directory", "part_directory"]
