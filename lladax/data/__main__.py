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

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from lladax.data.manifest import SIDES, read_manifest
from lladax.data.prepare import PACKINGS, Progress, Recipe, prepare
from lladax.data.units import Reading
from lladax.data.verify import describe, verify

_USUAL = Recipe(sources=("",))


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; its exit status."""
  options = _parser().parse_args(arguments)
  try:
    return options.run(options) or 0
  except (ValueError, OSError, ImportError, RuntimeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    return 130


def _parser() -> argparse.ArgumentParser:
  # Not absl's flags: each command has its own, and they are not the process's.
  parser = argparse.ArgumentParser(
    prog="python -m lladax.data",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True, metavar="command")
  _prepare_options(commands)

  inspect = commands.add_parser("inspect", help="Show a prepared folder and some of its rows.")
  inspect.add_argument("folder", type=pathlib.Path)
  inspect.add_argument("--rows", type=int, default=3, help="How many rows.")
  inspect.add_argument("--side", choices=SIDES, default="train", help="Which rows.")
  inspect.set_defaults(run=run_inspect)

  check = commands.add_parser("verify", help="Read all of a prepared folder; status 1 if damaged.")
  check.add_argument("folder", type=pathlib.Path)
  _process_options(check)
  check.set_defaults(run=run_verify)

  check = commands.add_parser("check", help="Read files of conversations or preference pairs.")
  check.add_argument("files", nargs="+")
  check.set_defaults(run=run_check)
  return parser


def _prepare_options(commands):
  parser = commands.add_parser(
    "prepare",
    help="Make packed rows of text, or go on with it.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.set_defaults(run=run_prepare)

  def option(name: str, help: str, **more):
    more.setdefault("default", getattr(_USUAL, name.lstrip("-"), None))
    parser.add_argument(name, help=help, **more)

  option(
    "--source",
    "File, pattern or folder (JSON Lines, Parquet, ArrayRecord, text; .gz and .zst of JSON Lines "
    "and text), hf:<id>, shakespeare or python. May be repeated.",
    action="append",
    required=True,
  )
  option("--target", "Folder to make, or to finish.", required=True)
  option(
    "--tokenizer",
    "bytes, bpe:<vocabulary>, a tokenizer.json or its folder, or the workdir of a run.",
  )
  option("--length", "Tokens in a row.", type=int)
  option("--heldout", "Fraction of the documents that is held out.", type=float)
  option("--split_seed", "Chooses the held-out documents.", type=int)
  option(
    "--packing",
    "stream: end to end, cut every row. best_fit: nothing is cut that fits a row; more padding.",
    choices=list(PACKINGS),
    default="stream",
  )
  option("--text_field", "Field of JSON objects and tables that holds the text.", default="text")
  option("--separator", "Cuts text files into documents, e.g. $'\\n\\n'.")
  option("--records", "What an ArrayRecord record is.", choices=["json", "text"], default="json")
  for name in ("mask", "eos", "pad"):
    option(f"--{name}_token", "Its name in tokenizer.json, where it is unusual.")
  option("--tokenizer_sample", "Characters on which a BPE is trained.", type=int)
  option("--unit_bytes", "Size of a unit of work, about; also of a shard.", type=int)
  _process_options(parser)


def _process_options(parser: argparse.ArgumentParser):
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Processes.")
  parser.add_argument(
    "--progress",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="Say how far the work is.",
  )


def run_prepare(options: argparse.Namespace):
  names = ("tokenizer", "length", "heldout", "split_seed", "mask_token", "eos_token", "pad_token",
           "tokenizer_sample", "unit_bytes")  # fmt: skip
  recipe = Recipe(
    sources=tuple(options.source),
    packing=PACKINGS[options.packing],
    reading=Reading(
      text_field=options.text_field, separator=options.separator, records=options.records
    ),
    **{name: getattr(options, name) for name in names},
  )
  shown = _shown(options)
  try:
    manifest = prepare(recipe, options.target, workers=options.workers, show=shown)
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
    f"{options.target}: {rows:,} rows of {manifest.length} to train on, "
    f"{padding / (rows * manifest.length):.2%} of them padding; {heldout:,} documents held out"
  )
  if recipe.heldout and not heldout:
    print("no document is held out: there are too few for this --heldout")


def run_inspect(options: argparse.Namespace):
  print("\n".join(describe(options.folder.expanduser(), rows=options.rows, side=options.side)))


def run_verify(options: argparse.Namespace) -> int:
  folder = options.folder.expanduser()
  size = sum(shard.size for side in SIDES for shard in getattr(read_manifest(folder), side))
  # Processes take seconds to start.
  workers = options.workers if size > 1 << 30 else 1
  shown, started = _shown(options), time.monotonic()

  def show(done: int, total: int):
    seconds = time.monotonic() - started
    shown(Progress(stage="verify", done=done, total=total, tokens=0, seconds=seconds,
                   workers=workers))  # fmt: skip

  try:
    problems = verify(folder, workers=workers, show=show)
  finally:
    shown.close()
  for problem in problems:
    print(problem)
  print(f"{folder}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
  return 1 if problems else 0


def run_check(options: argparse.Namespace):
  from lladax.data.conversations import check_conversations

  counts = check_conversations(options.files)
  print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))


# --- Progress ---

_STAGES = {
  "hash": "hashing",
  "tokenizer": "training the tokenizer",
  "rows": "preparing",
  "verify": "verifying",
}


def _shown(options: argparse.Namespace) -> ProgressLines:
  if not options.progress:
    return ProgressLines(every=float("inf"))
  return ProgressBar() if sys.stderr.isatty() else ProgressLines()


class ProgressLines:
  """A line every so many seconds, for logs.

  Attributes:
    last: what was told last.
  """

  def __init__(self, every: float = 10):
    self.last: Progress | None = None
    self._every = every
    self._next = time.monotonic() + every

  def __call__(self, progress: Progress):
    self.last = progress
    if time.monotonic() < self._next:
      return
    self._next = time.monotonic() + self._every
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
  sys.exit(main())
