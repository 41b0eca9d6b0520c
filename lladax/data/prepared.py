"""Text that was prepared (`python -m lladax.data prepare`), drawn from several folders by weight.

Rows are read where they lie, at random. Each source is drawn in an order of its own that the other
sources and the weights do not touch, so that a stage with other weights goes on with every source
where the stage before it stopped (`TrainIterator.continue_after`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from lladax.data.manifest import Manifest, describe_tokenizer, read_manifest, read_tokenizer
from lladax.data.mixture import Draws, Mixture, Part, order_seed
from lladax.data.pipeline import BatchesConfig, Data
from lladax.data.shards import ShardReader, check_shard
from lladax.data.text import check_crops, crop_lengths
from lladax.data.tokenizer import Tokenizer
from lladax.data.transforms import Rows, check_ids, make_batch
from lladax.types import Batch


@dataclasses.dataclass(frozen=True)
class Source:
  """A folder of prepared text and its share of the draws.

  Attributes:
    path: the folder.
    weight: relative to the other sources; 0 for one that only has its held-out text scored.
    name: for logs; None: the name of the folder.
  """

  path: str
  weight: float = 1.0
  name: str | None = None

  @property
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.path).expanduser()

  @property
  def label(self) -> str:
    return self.name or self.folder.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedConfig(BatchesConfig):
  """Prepared text, several sources of it by weight.

  Attributes:
    sources: folders, all of one tokenizer and of rows of `length`.
    random_length: fraction of rows cropped to a length of U{shortest..length}.
    shortest: see `random_length` (LLaDA-MoE: 8).

  Raises:
    ValueError: for a value outside its range, a weight below 0, weights that are all 0.
  """

  sources: tuple[Source, ...] = ()
  random_length: float = 0.01
  shortest: int = 8

  def __post_init__(self):
    super().__post_init__()
    check_crops(self.random_length, self.shortest)
    if not self.sources:
      raise ValueError("sources names at least one folder, e.g. sources=(Source('prepared'),)")
    for source in self.sources:
      if not 0 <= source.weight < float("inf"):
        raise ValueError(f"source {source.label!r}: a weight is at least 0, got {source.weight}")
    if not any(source.weight for source in self.sources):
      raise ValueError("the weights of all sources are 0; give one a weight above it")

  def load(
    self, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
  ) -> PreparedData:
    """Opens the folders and checks that every shard is there; rows are read later.

    Raises:
      FileNotFoundError: for a folder that was not prepared, or not to the end.
      ValueError: for a shard that is missing or not as its manifest says, rows of another length,
        tokenizers that differ, ids that the model does not have.
    """
    manifests = tuple(read_manifest(source.folder) for source in self.sources)
    self._check_manifests(manifests)
    own = read_tokenizer(self.sources[0].folder, manifests[0])
    if tokenizer is not None:
      given = describe_tokenizer(tokenizer)
      if given != describe_tokenizer(own):
        raise ValueError(
          f"the tokenizer given (vocabulary {given['vocab_size']}) is not the one that prepared "
          f"{self.sources[0].folder} ({manifests[0].tokenizer['spec']}, vocabulary "
          f"{own.vocab_size}); prepare the text with it"
        )
    if vocab_size is not None:
      check_ids(np.array([own.vocab_size - 1]), vocab_size)
    shards = [(source.folder, shard) for source, manifest in zip(self.sources, manifests, strict=True)
              for shard in (*manifest.train, *manifest.heldout)]  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(32) as pool:  # a folder may be far away
      list(pool.map(lambda pair: check_shard(*pair), shards))
    data = PreparedData(config=self, tokenizer=tokenizer or own, manifests=manifests)
    assert data.mixture  # raises what is wrong with the sources together
    return data

  def _check_manifests(self, manifests: tuple[Manifest, ...]):
    first = manifests[0].tokenizer
    for source, manifest in zip(self.sources, manifests, strict=True):
      if manifest.length != self.length:
        raise ValueError(
          f"{source.folder} holds rows of {manifest.length} tokens, and data.length is "
          f"{self.length}; prepare it with --length={self.length}, or set "
          f"data.length={manifest.length}"
        )
      if manifest.tokenizer["sha256"] != first["sha256"]:
        raise ValueError(
          f"{source.folder} was prepared with another tokenizer ({manifest.tokenizer['spec']}, "
          f"sha256 {manifest.tokenizer['sha256'][:12]}) than {self.sources[0].folder} "
          f"({first['spec']}, sha256 {first['sha256'][:12]}); prepare it again with "
          f"--tokenizer={self.sources[0].folder / 'tokenizer'}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreparedData(Data):
  """Rows of several prepared folders.

  Attributes:
    manifests: of the sources, in their order.
  """

  config: PreparedConfig
  manifests: tuple[Manifest, ...]

  @functools.cached_property
  def mixture(self) -> Mixture:
    seed = self.config.seed
    return Mixture(
      Part(
        name=source.label,
        key=manifest.key,
        size=manifest.total("rows", "train"),
        weight=source.weight,
        order_seed=order_seed(seed, int(manifest.key[:8], 16), int(manifest.key[8:], 16)),
      )
      for source, manifest in zip(self.config.sources, self.manifests, strict=True)
    )

  def train_batch(self, draws: Draws, rows: np.ndarray) -> Batch:
    draws = draws[rows]
    numbers = self.mixture.rows(draws)
    read = _read(self._train_readers, draws.part, numbers)
    lengths = crop_lengths(self.config.seed, draws.number, self.config)
    index = np.arange(len(rows))
    return make_batch(read, index, pad_id=self.tokenizer.pad_id, lengths=lengths)

  @functools.cached_property
  def num_heldout(self) -> int:
    return sum(map(len, self._heldout_readers))

  def heldout_batch(self, index: np.ndarray) -> Batch:
    ends = np.cumsum([len(reader) for reader in self._heldout_readers])
    part = np.searchsorted(ends, index, side="right")
    starts = np.concatenate([[0], ends[:-1]])
    numbers = np.where(index < 0, -1, index - starts[np.where(index < 0, 0, part)])
    read = _read(self._heldout_readers, np.where(index < 0, 0, part), numbers)
    places = np.where(index < 0, -1, np.arange(len(index)))
    return make_batch(read, places, pad_id=self.tokenizer.pad_id)

  @property
  def heldout_bytes(self) -> int:
    """UTF-8 bytes of the held-out documents of all sources."""
    return sum(manifest.total("text_bytes", "heldout") for manifest in self.manifests)

  def fingerprint(self) -> dict[str, Any]:
    return {
      "sources": [manifest.key for manifest in self.manifests],
      "heldout": [manifest.key_of("heldout") for manifest in self.manifests],
      "tokenizer": self.manifests[0].tokenizer["sha256"],
    }

  @functools.cached_property
  def _train_readers(self) -> list[ShardReader]:
    return self._readers("train")

  @functools.cached_property
  def _heldout_readers(self) -> list[ShardReader]:
    return self._readers("heldout")

  def _readers(self, side: str) -> list[ShardReader]:
    return [
      ShardReader(
        source.folder,
        getattr(manifest, side),
        length=manifest.length,
        vocab_size=self.tokenizer.vocab_size,
        pad_id=self.tokenizer.pad_id,
      )
      for source, manifest in zip(self.config.sources, self.manifests, strict=True)
    ]


def _read(readers: list[ShardReader], part: np.ndarray, numbers: np.ndarray) -> Rows:
  """Rows [R, L], row i being number `numbers[i]` of reader `part[i]`."""
  rows = None
  for which in np.unique(part):
    own = part == which
    some = readers[which].read(numbers[own])
    if rows is None:
      shape = (len(part), some.length)
      rows = Rows(*(np.empty(shape, np.int32) for _ in range(3)))
    rows.tokens[own] = some.tokens
    rows.segment_ids[own], rows.positions[own] = some.segment_ids, some.positions
  return rows
