"""What has been said in a chat, kept in a file and brought back."""

from __future__ import annotations

import json
import pathlib

from lladax.model import Model


class Conversation:
  """What has been said: messages where the model has a chat template, else one running text."""

  def __init__(self, model: Model):
    self._model = model
    self.chats = model.conversation is not None
    self.messages: list[dict[str, str]] = []
    self.text = ""

  def prompt(self, line: str, room: int) -> list[int]:
    """Ids up to where the answer to `line` begins; a running text is cut on the left to `room`.

    Raises:
      ValueError: for a conversation that leaves no room for an answer, or that the chat template
        refuses.
    """
    if not self.chats:
      return self._model.tokenizer.encode(self._joined(line))[-room:] if room else []
    ids = self._model.chat_prompt([*self.messages, {"role": "user", "content": line}])
    if len(ids) > room:
      raise ValueError(
        f"the conversation has {len(ids)} tokens and there is room for {room} beside the answer; "
        "/reset begins anew"
      )
    return ids

  def add(self, line: str, answer: str):
    self.text = self._joined(line) + answer
    self.messages += [
      {"role": "user", "content": line}, {"role": "assistant", "content": answer}
    ]  # fmt: skip

  def system(self, text: str):
    rest = [message for message in self.messages if message["role"] != "system"]
    self.messages = [{"role": "system", "content": text}, *rest]

  def reset(self):
    self.messages, self.text = [], ""

  def save(self, path: str):
    tree = {"messages": self.messages} if self.chats else {"text": self.text}
    pathlib.Path(path).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")

  def load(self, path: str):
    """Raises ValueError for a file that `save` did not write for such a model."""
    field, kind = ("messages", list) if self.chats else ("text", str)
    tree = json.loads(pathlib.Path(path).read_text())
    if not isinstance(tree, dict) or not isinstance(tree.get(field), kind):
      raise ValueError(f"{path} has no {field!r}: it is no conversation of a model like this one")
    if self.chats:
      self._model.chat_prompt(tree["messages"])
    setattr(self, field, tree[field])

  def _joined(self, line: str) -> str:
    return f"{self.text}\n{line}" if self.text else line
