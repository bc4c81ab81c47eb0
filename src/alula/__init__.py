"""alula: give a language model eyes without costing it its words."""

__version__ = "0.1.0"
