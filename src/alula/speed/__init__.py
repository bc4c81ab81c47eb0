"""What policies save on a user's own model, data and machine, and what they cost in answers.

`measure` measures every policy of a grid beside the model without any, `recommend` finds the cheapest within a budget,
`speed_report` draws one HTML page.
"""

from alula.speed.advice import Recommendation, frontier, recommend, save_recommended, warnings
from alula.speed.grid import Candidate, default_grid, read_grid
from alula.speed.plan import Plan
from alula.speed.record import Part, Row, Speed, Spread
from alula.speed.report import speed_report, speed_table
from alula.speed.run import measure

__all__ = [
    "Candidate",
    "Part",
    "Plan",
    "Recommendation",
    "Row",
    "Speed",
    "Spread",
    "default_grid",
    "frontier",
    "measure",
    "read_grid",
    "recommend",
    "save_recommended",
    "speed_report",
    "speed_table",
    "warnings",
]
