"""Talking to a model: a conversation with its history, and the terminal around it."""

from alula.serving.conversation import Conversation, Reply
from alula.serving.terminal import Terminal

__all__ = ["Conversation", "Reply", "Terminal"]
