"""Demonstrations: examples of a task, shown before the question; encoded once, kept in a bank, spliced into prompts."""

from alula.demonstrations.bank import Bank, shots_in
from alula.demonstrations.demonstration import Demonstration, demonstrations_in
from alula.demonstrations.encoding import Shot, encode
from alula.demonstrations.few_shot import FewShot
from alula.demonstrations.filling import Filled, conversations, fill

__all__ = [
    "Bank",
    "Demonstration",
    "FewShot",
    "Filled",
    "Shot",
    "conversations",
    "demonstrations_in",
    "encode",
    "fill",
    "shots_in",
]
