"""The version of this package, for every room that notes it in a record."""

__version__ = "0.1.0"
