"""Text to batches: corpora, tokenizers, packing and the grain pipeline."""

from lladax.data.corpora import Document, load_corpus
from lladax.data.fingerprint import Fingerprint
from lladax.data.mixture import Mixture
from lladax.data.pipeline import BatchesConfig, Data, TrainIterator, load_data
from lladax.data.prepared import PreparedConfig, Source
from lladax.data.text import DataConfig, TextData
from lladax.data.tokenizer import (
  Bytes,
  JsonTokenizer,
  Tokenizer,
  encode_with_masks,
  load_tokenizer,
  make_tokenizer,
  train_bpe,
)
from lladax.data.transforms import (
  Rows,
  check_ids,
  make_batch,
  pack,
  split_documents,
  unpack,
)

__all__ = [
  "BatchesConfig",
  "Bytes",
  "Data",
  "DataConfig",
  "Document",
  "Fingerprint",
  "JsonTokenizer",
  "Mixture",
  "PreparedConfig",
  "Rows",
  "Source",
  "TextData",
  "Tokenizer",
  "TrainIterator",
  "check_ids",
  "encode_with_masks",
  "load_corpus",
  "load_data",
  "load_tokenizer",
  "make_batch",
  "make_tokenizer",
  "pack",
  "split_documents",
  "train_bpe",
  "unpack",
]
