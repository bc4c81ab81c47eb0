"""Commands that plug into ``alula``."""
