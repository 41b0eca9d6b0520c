"""A tokenizer with its chat template: what a fine-tuned run saves, so that its model chats."""

from __future__ import annotations

import dataclasses
import json
import os

import tokenizers
from etils import epath

from lladax.data.tokenizer import Bytes, JsonTokenizer, Tokenizer
from lladax.hub.chat import Chat, ChatTemplate
from lladax.hub.folder_tokenizer import bytes_as_json

_TEMPLATE_FILE = "chat_template.json"  # beside the tokenizer's own files


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTokenizer(JsonTokenizer):
  """A tokenizer that knows how messages become prompts: the template is saved beside it."""

  template: ChatTemplate

  def save(self, directory: str | os.PathLike) -> None:
    super().save(directory)
    fields = dataclasses.asdict(self.template)
    text = json.dumps(fields, indent=1, ensure_ascii=False)
    (epath.Path(directory) / _TEMPLATE_FILE).write_text(text + "\n")


def chat_tokenizer(
  tokenizer: Tokenizer, template: ChatTemplate, *, vocab_size: int | None = None
) -> ChatTokenizer:
  """The tokenizer with the template and with the special tokens that the template spells.

  Those that it lacks are appended after its last id, so all other ids keep their meaning.

  Args:
    vocab_size: of the model: the new ids have to be below it.

  Raises:
    ValueError: if they do not fit, or the token that ends a turn is MASK.
  """
  if isinstance(tokenizer, Bytes):
    tokenizer = bytes_as_json()
  engine = tokenizers.Tokenizer.from_str(tokenizer.engine.to_str())
  engine.encode_special_tokens = True
  missing = [token for token in template.spells if engine.token_to_id(token) is None]
  first = tokenizer.vocab_size
  if vocab_size is not None and first + len(missing) > vocab_size:
    raise ValueError(
      f"the chat template {template.name!r} needs {len(missing)} more tokens ({', '.join(missing)}), "
      f"ids {first} to {first + len(missing) - 1}, and the model has {vocab_size} ids; give the "
      "model a larger vocab_size before it is trained, or use the template 'plain'"
    )
  # The library numbers new tokens by the size of the vocabulary, which may have holes below it.
  description = json.loads(engine.to_str())
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  description["added_tokens"] += [
    {"id": first + i, "content": token, **flags, "special": True} for i, token in enumerate(missing)
  ]
  engine = tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
  engine.encode_special_tokens = True
  moved = [token for i, token in enumerate(missing) if engine.token_to_id(token) != first + i]
  if moved:
    raise ValueError(
      f"the tokenizer's vocabulary has holes, and {moved[0]!r} cannot get the next id; add the "
      "template's special tokens to its tokenizer.json"
    )
  names = tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token
  extended = ChatTokenizer(engine, *names, template)
  Chat(extended, template).end_of_turn_id  # noqa: B018  refuses a MASK
  return extended


def read_chat(directory: str | os.PathLike, tokenizer: Tokenizer) -> Chat | None:
  """How messages become prompts, where a `ChatTokenizer` was saved; None where it was another.

  Args:
    directory: that `ChatTokenizer.save` wrote.
    tokenizer: read from there by `lladax.data.load_tokenizer`.

  Raises:
    ValueError: if the template is unreadable.
  """
  path = epath.Path(directory) / _TEMPLATE_FILE
  if not path.exists():
    return None
  try:
    fields = json.loads(path.read_text())
    fields["special_tokens"] = tuple(map(tuple, fields["special_tokens"]))
    template = ChatTemplate(**{**fields, "spells": tuple(fields["spells"])})
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} does not describe a chat template: {error!r}") from None
  return Chat(tokenizer, template)


def same_ids(old: Tokenizer, new: Tokenizer) -> bool:
  """Whether every id and every text mean to `new` what they mean to `old`; it may know more ids.

  A `ChatTokenizer` of a tokenizer, for one, has its ids.
  """
  descriptions = []
  for tokenizer in (old, new):
    if isinstance(tokenizer, Bytes):
      tokenizer = bytes_as_json()
    description = json.loads(tokenizer.engine.to_str())
    added = {entry["id"]: entry for entry in description.pop("added_tokens")}
    special = tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id
    descriptions.append((added, description, special))
  (old_added, *old_rest), (new_added, *new_rest) = descriptions
  return old_rest == new_rest and old_added.items() <= new_added.items()
