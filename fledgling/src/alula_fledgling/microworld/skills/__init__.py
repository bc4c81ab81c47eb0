"""Text skills: ten families that a tuning run can destroy, each with contents held out for testing.

A skill is a function ``(draw, split) -> Exchanges``: one exchange, or several for the family that needs a conversation;
the last exchange is the one that is scored. Contents are drawn until one belongs to the split
(``alula_fledgling.microworld.splits.split_of``), so no prompt of one split occurs in the other.
"""

from __future__ import annotations

from collections.abc import Callable

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.skills import deduction, facts, memory, numbers, reading, sequences

Skill = Callable[[Draw, str], tuple[Exchange, ...]]

SKILLS: dict[str, Skill] = {
    "facts": facts.fact,
    "two_hop": facts.two_hop,
    "arithmetic": numbers.arithmetic,
    "comparison": numbers.comparison,
    "sorting": numbers.sorting,
    "reversal": sequences.reversal,
    "pattern": sequences.pattern,
    "deduction": deduction.deduction,
    "reading": reading.reading,
    "memory": memory.memory,
}

TEXT_FAMILIES = tuple(SKILLS)
SINGLE_TURN_FAMILIES = tuple(family for family in SKILLS if family != "memory")
"""The families that fit into one turn of a longer dialogue."""
