"""Text of any size made into packed rows on disk, once, before a run: `python -m lladax.data prepare`.

The sources are cut into units, each unit becomes its own shards in some process, and the manifest
is written when all are there. Killed and started again, the work goes on after the units that are
finished; the result is the same to the byte, on any number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging
from etils import epath

from lladax.config import to_tree
from lladax.data.manifest import (
  MANIFEST,
  PLAN,
  SAMPLE,
  SIDES,
  TOKENIZER,
  Manifest,
  describe_tokenizer,
  read_manifest,
  write_json,
)
from lladax.data.packing import BestFit, Packing, Stream
from lladax.data.shards import Shard
from lladax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer, train_bpe
from lladax.data.units import Reading, Unit, find_pieces, group_units, read_unit
from lladax.data.work import UNITS, Job, Workers, hash_source, is_heldout, prepare_unit

PACKINGS = {"stream": Stream(), "best_fit": BestFit()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """What is prepared and how: everything that decides the bytes of the result.

  Attributes:
    sources: files, patterns, folders, `hf:<id>`, `shakespeare` or `python`.
    tokenizer: `bytes`, `bpe:<vocabulary>` (trained on a sample of the training documents), a
      `tokenizer.json` or its folder, or the workdir of a run.
    length: tokens in a row, L.
    heldout: fraction of the documents held out.
    split_seed: chooses them, by a keyed hash of their text.
    packing: how documents become rows.
    reading: how text is taken from files.
    mask_token, eos_token, pad_token: their names in a `tokenizer.json`, where they are unusual.
    tokenizer_sample: characters on which a `bpe:<vocabulary>` is trained, from all over the sources.
    unit_bytes: size of a unit of work, about; also of a shard.

  Raises:
    ValueError: for a value outside its range.
  """

  sources: tuple[str, ...]
  tokenizer: str = "bytes"
  length: int = 4096
  heldout: float = 0.001
  split_seed: int = 0
  packing: Packing = Stream()
  reading: Reading = Reading()
  mask_token: str | None = None
  eos_token: str | None = None
  pad_token: str | None = None
  tokenizer_sample: int = 50_000_000
  unit_bytes: int = 64 << 20

  def __post_init__(self):
    if not self.sources:
      raise ValueError("no source given; name one, e.g. --source=corpus.jsonl")
    if len(set(self.sources)) < len(self.sources):
      raise ValueError(f"a source is given twice: {', '.join(self.sources)}")
    for name in ("length", "tokenizer_sample", "unit_bytes"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
    if not 0 <= self.heldout < 1:
      raise ValueError(f"heldout is a fraction of at least 0 and below 1, got {self.heldout}")
    if self.split_seed < 0:
      raise ValueError(f"split_seed is not negative, got {self.split_seed}")
    if self.trained_size is not None and not self.trained_size.isdecimal():
      raise ValueError(f"tokenizer {self.tokenizer!r}: a size is expected, e.g. 'bpe:4096'")

  @property
  def trained_size(self) -> str | None:
    """Of a tokenizer that is trained here."""
    kind, _, size = self.tokenizer.partition(":")
    return size if kind == "bpe" else None

  def command(self, target: pathlib.Path) -> str:
    """The command that prepares it, flags at their defaults left out."""
    named = [name for name, packing in PACKINGS.items() if packing == self.packing]
    flags = {"packing": named[0] if named else repr(self.packing)}
    flags |= dataclasses.asdict(self.reading)
    flags |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
              if field.name not in ("sources", "packing", "reading")}  # fmt: skip
    usual = Recipe(sources=("",))
    defaults = dataclasses.asdict(usual) | dataclasses.asdict(usual.reading) | {"packing": "stream"}
    words = [f"--source={source}" for source in self.sources] + [f"--target={target}"]
    words += [f"--{name}={value}" for name, value in flags.items() if value != defaults[name]]
    return shlex.join(["python", "-m", "lladax.data", "prepare", *words])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """How far the work is.

  Attributes:
    stage: "hash", "tokenizer", "rows" or "verify".
    done, total: bytes of the sources, or 0.
    tokens: made so far, in this process's lifetime.
    seconds: since the stage began.
    workers: processes.
  """

  stage: str
  done: int
  total: int
  tokens: int
  seconds: float
  workers: int

  @property
  def tokens_per_second_per_core(self) -> float:
    return self.tokens / max(self.seconds, 1e-9) / self.workers


def prepare(
  recipe: Recipe,
  target: str | os.PathLike,
  *,
  workers: int = 1,
  show: Callable[[Progress], object] = lambda progress: None,
) -> Manifest:
  """Makes the folder `target`, or finishes it.

  Args:
    recipe: what and how.
    target: a new folder, or one in which the same recipe was begun.
    workers: processes.
    show: called every so often.

  Raises:
    ValueError: for sources or options that cannot be, a target of another recipe, sources that
      changed since it was begun.
    FileNotFoundError, ModuleNotFoundError: for sources and tokenizers that are not there.
    RuntimeError: if a worker process was killed.
  """
  if workers < 1:
    raise ValueError(f"workers are at least 1, got {workers}")
  target = pathlib.Path(target).expanduser()
  _check_target(target)
  pieces = {source: find_pieces(source, recipe.unit_bytes) for source in recipe.sources}
  tokenizer = None if recipe.trained_size else _find_tokenizer(recipe)
  with Workers(workers) as pool:
    started = time.monotonic()
    total = sum(piece.size for source in pieces.values() for piece in source)

    def tick(stage="hash", total=0):
      done, tokens = pool.done
      show(Progress(stage=stage, done=done, total=total, tokens=tokens, workers=workers,
                    seconds=time.monotonic() - started))  # fmt: skip

    sources = _hash_sources(pieces, pool, tick)
    plan = {"recipe": _as_json(to_tree(recipe)), "sources": sources}
    if (target / MANIFEST).exists():
      return _already_there(target, plan)
    units = [unit for source in pieces.values() for unit in group_units(source, recipe.unit_bytes)]
    with _begun(target, plan, recipe):
      started = time.monotonic()
      described = _settle_tokenizer(target, recipe, tokenizer, units, lambda: tick("tokenizer"))
      job = Job(
        folder=target,
        reading=recipe.reading,
        packing=recipe.packing,
        length=recipe.length,
        heldout=recipe.heldout,
        split_seed=recipe.split_seed,
        tokenizer=described["sha256"],
      )
      tasks = [(job, number, unit) for number, unit in enumerate(units)]
      started = time.monotonic()
      records = pool.run(prepare_unit, tasks, lambda: tick("rows", total))
      tick("rows", total)
      manifest = _manifest(recipe, plan, described, records)
      manifest.write(target)
      _clean(target, finished=True)
  return manifest


def _hash_sources(pieces, pool: Workers, tick) -> list[dict[str, Any]]:
  files = {source: list(dict.fromkeys(p.path for p in found)) for source, found in pieces.items()}
  paths = list(dict.fromkeys(path for found in files.values() for path in found))
  hashed = dict(zip(paths, pool.run(hash_source, [(path,) for path in paths], tick), strict=True))
  return [{"name": source, "files": [hashed[p] for p in found]} for source, found in files.items()]


# --- The target folder ---


def _check_target(target: pathlib.Path):
  """Raises ValueError where something else is."""
  if target.exists() and not target.is_dir():
    raise ValueError(f"the target {target} is a file")
  known = (target / MANIFEST).exists() or (target / PLAN).exists()
  content = [path for path in target.glob("*") if not path.name.startswith(".")]
  if content and not known:
    raise ValueError(f"the target {target} is not empty and holds no prepared text; choose another")


def _already_there(target: pathlib.Path, plan: dict[str, Any]) -> Manifest:
  manifest = read_manifest(target)
  _require_same(target, {"recipe": manifest.recipe, "sources": manifest.sources}, plan)
  if (target / PLAN).exists():  # killed at the last moment
    _clean(target, finished=True)
  return manifest


@contextlib.contextmanager
def _begun(target: pathlib.Path, plan: dict[str, Any], recipe: Recipe) -> Iterator[None]:
  """Within it the folder is ours, its plan is written, and what was left half done is gone."""
  target.mkdir(parents=True, exist_ok=True)
  lock = os.open(target, os.O_RDONLY)
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"another process is preparing {target}; wait for it, or stop it") from None
    path = target / PLAN
    if path.exists():
      _require_same(target, json.loads(path.read_text()), plan)
    _clean(target, finished=False)
    if not path.exists():
      write_json(path, {"command": recipe.command(target), **plan})
    (target / UNITS).mkdir(exist_ok=True)
    yield
  finally:
    os.close(lock)


def _require_same(target: pathlib.Path, saved: dict[str, Any], plan: dict[str, Any]):
  """Raises ValueError, naming what differs."""
  before, now = saved["recipe"], plan["recipe"]
  different = [f"{name} {before.get(name)!r} then, {now.get(name)!r} now"
               for name in {**before, **now} if before.get(name) != now.get(name)]  # fmt: skip
  if different:
    raise ValueError(
      f"{target} was prepared with other options ({'; '.join(different)}); choose another target"
    )
  if saved["sources"] != plan["sources"]:
    files = [{file["path"]: file for source in tree["sources"] for file in source["files"]}
             for tree in (saved, plan)]  # fmt: skip
    names = [path for path in {**files[0], **files[1]} if files[0].get(path) != files[1].get(path)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(
      f"sources of {target} changed since it was begun: {', '.join(names[:3])}{more}; put them "
      "back, or choose another target"
    )


def _clean(target: pathlib.Path, *, finished: bool):
  for path in target.glob(".*"):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  if finished:
    shutil.rmtree(target / UNITS, ignore_errors=True)
    (target / PLAN).unlink(missing_ok=True)


def _manifest(recipe: Recipe, plan, described, records: Sequence[dict[str, Any]]) -> Manifest:
  shards = {side: tuple(Shard(**shard) for record in records for shard in record[side])
            for side in SIDES}  # fmt: skip
  empty = sum(record["empty"] for record in records)
  if empty:
    logging.info("left out %d empty documents", empty)
  if not shards["train"]:
    raise ValueError(
      f"there is no text to train on in {', '.join(recipe.sources)}: {empty} empty documents, "
      f"{sum(shard.documents for shard in shards['heldout'])} held out"
    )
  return Manifest(**plan, tokenizer=described, length=recipe.length, **shards)


# --- The tokenizer ---


def _find_tokenizer(recipe: Recipe) -> Tokenizer:
  """Of bytes, a file, a folder or a workdir."""
  found = sorted(
    epath.Path(recipe.tokenizer).glob(f"checkpoints/*/run/{TOKENIZER}"),
    key=lambda path: int(path.parts[-3]) if path.parts[-3].isdecimal() else -1,
  )
  if found:
    return load_tokenizer(found[-1])
  names = {name: getattr(recipe, name) for name in ("mask_token", "eos_token", "pad_token")}
  return make_tokenizer(recipe.tokenizer, **names)


def _settle_tokenizer(
  target: pathlib.Path, recipe: Recipe, tokenizer: Tokenizer | None, units, tick
) -> dict[str, Any]:
  """Puts the tokenizer into the folder where it is not there yet; what the manifest says of it."""
  folder, spec = target / TOKENIZER, {"spec": recipe.tokenizer}
  trained = folder / SAMPLE
  if tokenizer is None and trained.exists():
    return _described(load_tokenizer(folder), spec | json.loads(trained.read_text()))
  sample = {}
  if tokenizer is None:
    tick()
    tokenizer, sample = _train(recipe, units)
  described = _described(tokenizer, spec | sample)
  if folder.exists() and not sample:
    saved = describe_tokenizer(load_tokenizer(folder))
    if saved["sha256"] != described["sha256"]:
      raise ValueError(f"the tokenizer {recipe.tokenizer} changed since {target} was begun")
    return described
  unfinished = target / f".{TOKENIZER}"
  tokenizer.save(unfinished)
  if sample:
    write_json(unfinished / SAMPLE, sample)
  os.replace(unfinished, folder)
  return described


def _described(tokenizer: Tokenizer, more: dict[str, Any]) -> dict[str, Any]:
  return describe_tokenizer(tokenizer) | more


def _train(recipe: Recipe, units: Sequence[Unit]) -> tuple[Tokenizer, dict[str, Any]]:
  texts = list(_sample(recipe, units))
  characters = sum(map(len, texts))
  tokenizer = train_bpe(texts, int(recipe.trained_size))
  return tokenizer, {"trained_on": {"documents": len(texts), "characters": characters}}


def _sample(recipe: Recipe, units: Sequence[Unit]) -> Iterator[str]:
  """Training documents from the beginning of up to 256 units, evenly over the sources."""
  count = min(len(units), 256)
  share = -(-recipe.tokenizer_sample // count)
  for index in range(count):
    left = share
    for document in read_unit(units[index * len(units) // count], recipe.reading):
      if not document.text or is_heldout(document.text, recipe.heldout, recipe.split_seed):
        continue
      text = document.text[:left]
      yield text
      left -= len(text)
      if left <= 0:
        break


def _as_json(tree: Any) -> Any:
  return json.loads(json.dumps(tree))
