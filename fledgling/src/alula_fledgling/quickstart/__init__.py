"""The main job: tune one base several ways on the same pictures, and prove, item by item, which words each way kept."""

from alula_fledgling.quickstart.plan import METHODS, Plan
from alula_fledgling.quickstart.run import quickstart

__all__ = ["METHODS", "Plan", "quickstart"]
