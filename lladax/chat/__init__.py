"""A chat in the terminal in which answers crystallise."""

from lladax.chat.answer import Answer
from lladax.chat.conversation import Conversation
from lladax.chat.session import Session, talk

__all__ = ["Answer", "Conversation", "Session", "talk"]
