"""Which tokenizer for reading, which for drawing: TEAL by tokenizer, size of the codebook, and one against two."""

from studies.tokens.plan import TokensPlan
from studies.tokens.record import TokensRecord
from studies.tokens.report import figures, markdown, report, table, verdict
from studies.tokens.study import tokens

__all__ = ["TokensPlan", "TokensRecord", "figures", "markdown", "report", "table", "tokens", "verdict"]
