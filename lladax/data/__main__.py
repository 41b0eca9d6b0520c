"""Text made ready for training, and looked at, from the command line.

python -m lladax.data prepare --source=corpus.jsonl --target=prepared --tokenizer=bpe:4096
python -m lladax.data inspect prepared
python -m lladax.data verify prepared
python -m lladax.data check conversations.jsonl

`prepare` makes packed rows of any amount of text, once; stopped and started again, it goes on. A
run reads them by `PreparedConfig(sources=(Source("prepared"),))`. `inspect` shows what is in such a
folder, `verify` reads all of it, and `check` reads files of conversations or preference pairs.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from lladax.data.prepare import PACKINGS, Progress, Recipe, prepare
from lladax.data.units import Reading
from lladax.data.verify import describe, verify

FLAGS = flags.FLAGS
_USUAL = Recipe(sources=("",))

flags.DEFINE_multi_string(
  "source",
  [],
  "File, pattern or folder (JSON Lines, Parquet, ArrayRecord, text; .gz and .zst of JSON Lines and "
  "text), hf:<id>, shakespeare or python. May be repeated.",
)
flags.DEFINE_string("target", None, "Folder to make, or to finish.")
flags.DEFINE_string(
  "tokenizer",
  _USUAL.tokenizer,
  "bytes, bpe:<vocabulary>, a tokenizer.json or its folder, or the workdir of a run.",
)
flags.DEFINE_integer("length", _USUAL.length, "Tokens in a row.", lower_bound=1)
flags.DEFINE_float("heldout", _USUAL.heldout, "Fraction of the documents that is held out.")
flags.DEFINE_integer("split_seed", _USUAL.split_seed, "Chooses the held-out documents.")
flags.DEFINE_enum(
  "packing",
  "stream",
  list(PACKINGS),
  "stream: end to end, cut every row. best_fit: nothing is cut that fits a row; more padding.",
)
flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes.", lower_bound=1)
flags.DEFINE_string("text_field", "text", "Field of JSON objects and tables that holds the text.")
flags.DEFINE_string("separator", None, "Cuts text files into documents.")
flags.DEFINE_enum("records", "json", ["json", "text"], "What an ArrayRecord record is.")
flags.DEFINE_string("mask_token", None, "Its name in tokenizer.json, where it is unusual.")
flags.DEFINE_string("eos_token", None, "Its name in tokenizer.json, where it is unusual.")
flags.DEFINE_string("pad_token", None, "Its name in tokenizer.json, where it is unusual.")
flags.DEFINE_integer(
  "tokenizer_sample", _USUAL.tokenizer_sample, "Characters on which a BPE is trained."
)
flags.DEFINE_integer("unit_bytes", _USUAL.unit_bytes, "Size of a unit of work, about.")
flags.DEFINE_integer("rows", 3, "Rows that inspect shows.", lower_bound=0)
flags.DEFINE_enum("side", "train", ["train", "heldout"], "Which rows inspect shows.")
flags.DEFINE_bool("progress", True, "Say how far the work is.")


def main(argv: Sequence[str]):
  commands = {
    "prepare": run_prepare,
    "inspect": run_inspect,
    "verify": run_verify,
    "check": run_check,
  }
  if len(argv) < 2 or argv[1] not in commands:
    raise app.UsageError(f"expected one of the commands {', '.join(commands)}; got {argv[1:]}")
  try:
    status = commands[argv[1]](argv[2:])
  except (ValueError, OSError, ImportError, RuntimeError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit(130)
  sys.exit(status or 0)


def run_prepare(arguments: Sequence[str]):
  if arguments or not FLAGS.target:
    raise app.UsageError(f"prepare takes --source=... and --target=..., got {list(arguments)}")
  names = ("tokenizer", "length", "heldout", "split_seed", "mask_token", "eos_token", "pad_token",
           "tokenizer_sample", "unit_bytes")  # fmt: skip
  recipe = Recipe(
    sources=tuple(FLAGS.source),
    packing=PACKINGS[FLAGS.packing],
    reading=Reading(text_field=FLAGS.text_field, separator=FLAGS.separator, records=FLAGS.records),
    **{name: getattr(FLAGS, name) for name in names},
  )
  shown = ProgressBar() if sys.stderr.isatty() else ProgressLines()
  try:
    manifest = prepare(
      recipe, FLAGS.target, workers=FLAGS.workers, show=shown if FLAGS.progress else shown.remember
    )
  finally:
    shown.close()
  last = shown.last
  if last is not None and last.stage == "rows" and last.tokens:
    print(
      f"{last.tokens:,} tokens in {last.seconds:.1f} s on {last.workers} workers: "
      f"{last.tokens_per_second_per_core:,.0f} tokens/s per core"
    )
  rows, padding = manifest.total("rows", "train"), manifest.total("padding", "train")
  heldout = manifest.total("documents", "heldout")
  print(
    f"{FLAGS.target}: {rows:,} rows of {manifest.length} to train on, "
    f"{padding / (rows * manifest.length):.2%} of them padding; {heldout:,} documents held out"
  )
  if recipe.heldout and not heldout:
    print("no document is held out: there are too few for this --heldout")


def run_inspect(arguments: Sequence[str]):
  print("\n".join(describe(_folder(arguments), rows=FLAGS.rows, side=FLAGS.side)))


def run_verify(arguments: Sequence[str]) -> int:
  folder = _folder(arguments)
  problems = verify(folder)
  for problem in problems:
    print(problem)
  print(f"{folder}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
  return 1 if problems else 0


def run_check(arguments: Sequence[str]):
  from lladax.data.conversations import check_conversations

  if not arguments:
    raise app.UsageError("check takes files of conversations")
  counts = check_conversations(list(arguments))
  print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))


def _folder(arguments: Sequence[str]) -> pathlib.Path:
  if len(arguments) != 1:
    raise app.UsageError(f"expected one prepared folder, got {list(arguments)}")
  return pathlib.Path(arguments[0]).expanduser()


# --- Progress ---

_STAGES = {"hash": "hashing", "tokenizer": "training the tokenizer", "rows": "preparing"}


class ProgressLines:
  """A line every ten seconds, for logs."""

  def __init__(self):
    self.last: Progress | None = None
    self._next = time.monotonic() + 10

  def remember(self, progress: Progress):
    self.last = progress

  def __call__(self, progress: Progress):
    self.last = progress
    if time.monotonic() < self._next:
      return
    self._next = time.monotonic() + 10
    share = f" {progress.done / progress.total:.1%}" if progress.total else ""
    rate = f", {progress.tokens_per_second_per_core:,.0f} tokens/s per core"
    print(
      f"{_STAGES[progress.stage]}{share}{rate if progress.tokens else ''}",
      file=sys.stderr,
      flush=True,
    )

  def close(self):
    pass


class ProgressBar(ProgressLines):
  """A bar on a terminal."""

  def __init__(self):
    from rich.console import Console
    from rich.progress import (
      BarColumn,
      DownloadColumn,
      Progress,
      TextColumn,
      TimeRemainingColumn,
    )

    super().__init__()
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      DownloadColumn(),
      TimeRemainingColumn(),
      TextColumn("{task.fields[rate]}"),
      console=Console(stderr=True),
      transient=True,
    )
    self._task = self._bar.add_task(_STAGES["hash"], total=None, rate="")
    self._bar.start()

  def __call__(self, progress: Progress):
    self.last = progress
    rate = f"{progress.tokens_per_second_per_core:,.0f} tokens/s per core"
    self._bar.update(
      self._task,
      description=_STAGES[progress.stage],
      completed=progress.done,
      total=progress.total or None,
      rate=rate if progress.tokens else "",
    )

  def close(self):
    self._bar.stop()


if __name__ == "__main__":
  app.run(main)
