"""Drawings as inline SVG that take their colours and font from the page."""

from alula.reports.figures.butterfly import Sides, butterfly
from alula.reports.figures.curves import Curve, curves
from alula.reports.figures.scatter import Point, scatter

__all__ = ["Curve", "Point", "Sides", "butterfly", "curves", "scatter"]
