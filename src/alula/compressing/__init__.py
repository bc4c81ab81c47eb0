"""A host made smaller as far as a budget of its text and visual skill allows.

`compress` tries amounts, each evaluated against the model as it was, item by item, and saves the largest within the
budget; `compress_report` draws one HTML page.
"""

from alula.compressing.plan import Plan
from alula.compressing.record import Compressed, Trial
from alula.compressing.report import compress_report, compress_table
from alula.compressing.run import compress
from alula.compressing.search import largest

__all__ = ["Compressed", "Plan", "Trial", "compress", "compress_report", "compress_table", "largest"]
