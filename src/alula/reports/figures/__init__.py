"""Drawings as inline SVG that take their colours and font from the page."""

from alula.reports.figures.butterfly import Sides, butterfly
from alula.reports.figures.cloud import cloud
from alula.reports.figures.curves import Curve, curves
from alula.reports.figures.lines import Line, lines
from alula.reports.figures.scatter import Point, scatter
from alula.reports.figures.standalone import standalone
from alula.reports.figures.trails import Trail, trails

__all__ = [
    "Curve",
    "Line",
    "Point",
    "Sides",
    "Trail",
    "butterfly",
    "cloud",
    "curves",
    "lines",
    "scatter",
    "standalone",
    "trails",
]
