"""Released weights in and out: Hugging Face folders to parameters and back."""

from lladax.hub.chat import BUILT_IN, Chat, ChatTemplate, read_chat_template
from lladax.hub.chat_tokenizer import ChatTokenizer, chat_tokenizer, read_chat, same_ids
from lladax.hub.export import ExportError, save_folder
from lladax.hub.families import FAMILIES, Family, family_for, family_of
from lladax.hub.family import IDS
from lladax.hub.folder_tokenizer import read_folder_tokenizer
from lladax.hub.load import Loaded, load_folder
from lladax.hub.reader import FolderError, open_folder
from lladax.hub.source import Source
from lladax.hub.store import import_to, is_store, open_store

__all__ = [
  "BUILT_IN",
  "FAMILIES",
  "IDS",
  "Chat",
  "ChatTemplate",
  "ChatTokenizer",
  "ExportError",
  "Family",
  "FolderError",
  "Loaded",
  "Source",
  "chat_tokenizer",
  "family_for",
  "family_of",
  "import_to",
  "is_store",
  "load_folder",
  "open_folder",
  "open_store",
  "read_chat",
  "read_chat_template",
  "read_folder_tokenizer",
  "same_ids",
  "save_folder",
]
