"""Released weights in and out, from the command line.

python -m lladax.hub import --source=inclusionAI/LLaDA-MoE-7B-A1B-Instruct --target=weights/moe
python -m lladax.hub export --source=runs/tiny_text --target=exported

`import` reads a Hugging Face folder or hub id into a folder of ours; stopped and started again, it
goes on. `export` writes a Hugging Face folder, with a model card, from such a folder, from a run,
or from another Hugging Face folder (to change its dtype or its shards).
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import app, flags, logging

import lladax
from lladax.hub.card import model_card
from lladax.hub.store import import_to
from lladax.train.metrics import read_records

# Parts of a run's config that do not say how it was trained.
ELSEWHERE = ("class", "model.", "sampler.", "mesh.")

FLAGS = flags.FLAGS

flags.DEFINE_string(
  "source", None, "Folder, hub id or (to export) workdir of a run.", required=True
)
flags.DEFINE_string("target", None, "Folder to make; it must not exist.", required=True)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"],
                  "Of the weights; float16 for export only. Default: as in the source.")  # fmt: skip
flags.DEFINE_integer("mask_id", None, "Id of MASK, where the source does not tell.")
flags.DEFINE_integer("eos_id", None, "Id that ends a text, where the source does not tell.")
flags.DEFINE_integer("pad_id", None, "Id of padding, where the source does not tell.")
flags.DEFINE_integer("max_shard_size", 5_000_000_000, "Bytes of a shard of an export.")
flags.DEFINE_string("license", None, "For the model card of an export, e.g. apache-2.0.")
flags.DEFINE_bool("progress", True, "Show a bar.")


def main(argv):
  commands = {"import": run_import, "export": run_export}
  if len(argv) != 2 or argv[1] not in commands:
    raise app.UsageError(f"expected one of the commands {', '.join(commands)}; got {argv[1:]}")
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every file it reads
  try:
    commands[argv[1]]()
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(f"wrote {FLAGS.target}")


def run_import():
  if FLAGS.dtype == "float16":
    raise ValueError("--dtype=float16 is for export; lladax computes in float32 or bfloat16")
  import_to(
    FLAGS.source, FLAGS.target, dtype=FLAGS.dtype, ids=_ids(), progress=FLAGS.progress
  )  # fmt: skip


def run_export():
  target = pathlib.Path(FLAGS.target)
  if target.exists():  # before gigabytes are read
    raise ValueError(f"{target} exists; choose another name, or remove it")
  model = lladax.load(FLAGS.source, ids=_ids(), progress=FLAGS.progress)
  card = None
  if model.source is None:
    training, measured = run_record(pathlib.Path(FLAGS.source))
    card = model_card(
      model.config, name=target.name, training=training, measured=measured, license=FLAGS.license
    )
  model.save(target, card=card, dtype=FLAGS.dtype, max_shard_size=FLAGS.max_shard_size)


def _ids() -> dict[str, int]:
  ids = {
    f"{name}_token_id": getattr(FLAGS, f"{name}_id") for name in ("mask", "eos", "pad")
  }  # fmt: skip
  return {name: i for name, i in ids.items() if i is not None}


def run_record(workdir: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """How a run was trained and what it measured last, as lines of a model card.

  Args:
    workdir: of the run, its checkpoints or one of them.
  """
  places = [workdir, *workdir.resolve().parents[:2]]
  workdir = next((path for path in places if (path / "metrics.jsonl").exists()), None)
  if workdir is None:
    return {}, {}
  config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
  training = {name: value for name, value in _flat(config) if not name.startswith(ELSEWHERE)}
  measured: dict[str, Any] = {}
  for record in read_records(workdir):
    heldout = {name: value for name, value in record.items() if name.startswith("heldout/")}
    if heldout:
      measured = {"after step": record["step"]}
      measured |= {k: round(v, 4) if isinstance(v, float) else v for k, v in heldout.items()}
  return training, measured


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Leaves of a tree of JSON objects by dotted path."""
  if isinstance(value, Mapping):
    for name, inner in value.items():
      yield from _flat(inner, f"{prefix}.{name}" if prefix else name)
  else:
    yield prefix, value


if __name__ == "__main__":
  app.run(main)
