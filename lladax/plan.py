"""Plans a run on a slice of TPUs without having one: memory, FLOPs, collectives, time.

python -m lladax.plan --experiment=pretrain_llada_moe --topology=v5p:4x4x4
python -m lladax.plan --experiment=pretrain_llada_moe --topology=v5e:8x8 --fit --tokens=20e12
python -m lladax.plan --experiment=pretrain_llada_moe --topology=v5p:4x4x4 --sweep --json=plan.json
python -m lladax.plan --experiment=pretrain_llada_moe --topology=v5e:2x2 --mesh=tensor=4 --decode
python -m lladax.plan --table pretrain_llada_moe@v5e:8x8@microbatches=8 pretrain_llada_moe@v5p:4x4x4

Compiles the real train step for that slice with libtpu, on any machine with a CPU, and reads its
cost off the compiled program. Needs pip install -e '.[plan]'. The 7B takes three to seven minutes of a
CPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pathlib
import sys

from absl import app, flags, logging

from lladax.config import ConfigError, fields_help, override
from lladax.experiment import Experiment, chosen
from lladax.scaling import aot, decode, mesh_rule, report
from lladax.scaling.chips import CHIPS, GIB, Slice, describe, parse_slice
from lladax.scaling.plan import Plan, fit_microbatches, plan_training
from lladax.scaling.sweep import Tried, sweep, with_choice
from lladax.sharding import MeshConfig

SLICES = "\n".join(f"  {name}: {describe(chip)}" for name, chip in CHIPS.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What is asked for; each field is the flag of its name."""

  experiment: str | None = None
  topology: str | None = None
  mesh: str | None = None
  exchange: str | None = None
  sweep: bool = False
  limit: int | None = None
  fit: bool = False
  tokens: float | None = None
  decode: bool = False
  rows: tuple[str, ...] = ("1", "8")
  prompt: int = 1024
  weights: str | None = None
  table: bool = False
  json: str | None = None
  hlo: str | None = None
  set: tuple[str, ...] = ()


def define_flags():
  flags.DEFINE_string(
    "experiment",
    None,
    "Module with a config(): a name in experiments/, or a.dotted.module; "
    "name:stage for one of its stages.",
  )
  flags.DEFINE_string("topology", None, "Slice, as generation:shape. There are\n" + SLICES)
  flags.DEFINE_string(
    "mesh",
    None,
    "Devices by axis, e.g. fsdp=16,expert=4. Default: the rule's choice, with its arithmetic. "
    "Axes:\n" + fields_help(MeshConfig(data=1)),
  )
  flags.DEFINE_string(
    "exchange", None, "How tokens and experts meet, e.g. Fsdp, Ring. Default: the rule's choice."
  )
  flags.DEFINE_bool("sweep", False, "Compile all exchanges on all meshes that fit; name the best.")
  flags.DEFINE_integer("limit", None, "With --sweep: so many, the most promising first.")
  flags.DEFINE_bool("fit", False, "Double the microbatches until the step fits.")
  flags.DEFINE_float("tokens", None, "Budget of tokens, e.g. 20e12: say how many days it takes.")
  flags.DEFINE_bool("decode", False, "Plan decoding: a pass over the whole canvas, a block's step.")
  flags.DEFINE_list("rows", ["1", "8"], "With --decode: numbers of rows.")
  flags.DEFINE_integer("prompt", 1024, "With --decode: tokens of the prompt.")
  flags.DEFINE_string("weights", None, "With --decode: the experts' weights as int8 or fp8.")
  flags.DEFINE_bool(
    "table",
    False,
    "A Markdown table, a line for each argument experiment@topology[@field=value]; implies --fit.",
  )
  flags.DEFINE_string("json", None, "Write the plan to this file, too.")
  flags.DEFINE_string("hlo", None, "Write the text of the compiled program to this file, too.")
  flags.DEFINE_multi_string(
    "set", [], "Changes a field of the experiment, e.g. --set data.batch_size=512."
  )
  for field in dataclasses.fields(Options):
    # As flags of the program that runs, so that --help shows them.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[field.name])


def main(argv: list[str]):
  logging.set_verbosity(logging.WARNING)
  values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Options)}
  lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
  sys.exit(command(Options(**values | lists), argv[1:]))


def command(options: Options, arguments: list[str] | tuple[str, ...] = ()) -> int:
  """The exit status: 0, 1 (it does not fit), 2 (input), 130 (^C). A mistake is one line."""
  try:
    return run(options, arguments)
  except (ConfigError, aot.DoesNotFit) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130


def run(options: Options, arguments) -> int:
  if options.table:
    return table(options, arguments)
  if arguments:
    raise ConfigError(f"unexpected {arguments[0]!r}; arguments go with --table only")
  for name in ("experiment", "topology"):
    if not getattr(options, name):
      raise ConfigError(f"--{name} is missing; see --help")
  slice_ = slice_named(options.topology)
  config = override(experiment_named(options.experiment), options.set)
  aot.require_libtpu()
  aot.use_cpu()
  if options.decode:
    return plan_decode(options, config, slice_)
  if options.sweep:
    return plan_sweep(options, config, slice_)
  config, why = arranged(config, slice_, options.mesh, options.exchange)
  plan = make_plan(config, slice_, fit=options.fit)
  print(report.text(plan, tokens=options.tokens, title=config.name))
  print("\n" + why)
  write(options.hlo, plan.text)
  found = {"rule": why.splitlines(), **report.to_dict(plan, tokens=options.tokens)}
  write(options.json, json.dumps(found, indent=1))
  return 0 if plan.memory.fits else 1


def make_plan(config: Experiment, slice_: Slice, *, fit: bool) -> Plan:
  say(f"compiling {config.name} for {slice_.name} ...")
  return fit_microbatches(config, slice_, say)[1] if fit else plan_training(config, slice_)


def plan_sweep(options: Options, config: Experiment, slice_: Slice) -> int:
  tried = sweep(config, slice_, limit=options.limit, fit=options.fit, report=say)
  rows = [
    report.row(config.name, each.plan, each.config.microbatches) for each in tried if each.plan
  ]
  print(report.markdown(rows))
  for each in tried:
    if each.plan is None:
      print(f"refused: {describe_mesh(each)}: {each.refused}")
  best = tried[0]
  fits = best.plan is not None and best.plan.memory.fits
  if fits:
    print(f"\nbest: {describe_mesh(best)}\n")
    print(report.text(best.plan, tokens=options.tokens, title=config.name))
  else:
    print("\nnothing fits")
  found = [
    {
      "mesh": describe_mesh(each),
      "refused": each.refused,
      "plan": each.plan and report.to_dict(each.plan, tokens=options.tokens),
    }
    for each in tried
  ]
  write(options.json, json.dumps(found, indent=1))
  return 0 if fits else 1


def describe_mesh(tried: Tried) -> str:
  sizes = dataclasses.asdict(tried.config.mesh)
  moe = tried.config.model.moe
  exchange = f" --exchange {type(moe.exchange).__name__}" if moe else ""
  return f"--mesh {report.mesh_text(sizes)}{exchange}"


def plan_decode(options: Options, config: Experiment, slice_: Slice) -> int:
  try:
    rows = tuple(int(row) for row in options.rows)
  except ValueError:
    raise ConfigError(f"--rows are whole numbers, e.g. 1,8; got {','.join(options.rows)}") from None
  if options.exchange:
    raise ConfigError("decoding has one exchange, Ring where the experts divide; leave --exchange")
  if options.mesh is None:
    # Few tokens: weights stay where they are, as far as heads divide.
    heads = math.gcd(config.model.kv_heads, slice_.devices)
    mesh = {"data": 1, "tensor": heads, "expert": slice_.devices // heads}
  else:
    mesh = mesh_sizes(options.mesh)
  config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
  plans = decode.plan_decoding(
    config, slice_, rows=rows, prompt=options.prompt, weights=options.weights, report=say
  )
  print(decode.text(plans, config))
  write(options.json, json.dumps(decode.to_dict(plans), indent=1))
  return 0 if all(each.plan.memory.fits for each in plans) else 1


def table(options: Options, arguments) -> int:
  if not arguments:
    raise ConfigError("--table needs arguments experiment@topology, e.g. "
                      "pretrain_llada_moe@v5p:4x4x4")  # fmt: skip
  pairs = []
  for argument in arguments:
    name, topology, *changes = [*argument.split("@"), ""][: max(2, argument.count("@") + 1)]
    config = override(experiment_named(name), [*options.set, *changes])
    pairs.append((config, slice_named(topology)))
  aot.require_libtpu()
  aot.use_cpu()
  rows, plans = [], []
  for config, slice_ in pairs:
    config, why = arranged(config, slice_, options.mesh, options.exchange)
    say(f"compiling {config.name} for {slice_.name} ...")
    config, plan = fit_microbatches(config, slice_, say)
    rows.append(report.row(config.name, plan, config.microbatches))
    say(report.text(plan, tokens=options.tokens, title=config.name) + "\n\n" + why + "\n")
    plans.append(report.to_dict(plan, tokens=options.tokens))
  print(report.markdown(rows))
  write(options.json, json.dumps(plans, indent=1))
  return 0


# --- From words to objects ---


def experiment_named(name: str) -> Experiment:
  """The config of `experiments/<name>.py` or of a dotted module; `name:stage` is that of a stage."""
  name, _, variant = name.partition(":")
  module = name if "." in name else f"experiments.{name}"
  try:
    found = importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name and not module.startswith(error.name):
      raise ConfigError(f"the experiment {name} needs the module {error.name}") from error
    folder = pathlib.Path(importlib.import_module("experiments").__file__).parent
    names = [path.stem for path in folder.glob("*.py") if "def config(" in path.read_text()]
    raise ConfigError(f"there is no experiment {name!r}; one of {', '.join(sorted(names))}, or "
                      "a.dotted.module") from error  # fmt: skip
  if not hasattr(found, "config"):
    raise ConfigError(f"{module} has no config() and is no experiment")
  experiments = chosen(found.config, getattr(found, "STAGES", ()), variant)
  if len(experiments) > 1:
    raise ConfigError(f"a plan is of one stage of {name}; got {variant!r}")
  return experiments[0]


def slice_named(text: str) -> Slice:
  try:
    return parse_slice(text)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def mesh_sizes(text: str) -> dict[str, int]:
  """Sizes by axis of a text such as "fsdp=16,expert=4"; data is 1 unless it is said."""
  config = override(MeshConfig(data=1), [part for part in text.split(",") if part])
  return dataclasses.asdict(config)


def arranged(config: Experiment, slice_: Slice, mesh: str | None, exchange: str | None):
  """(config with mesh and exchange, why): as asked for, and the rest by the rule."""
  tokens = config.data.batch_size * config.data.length / config.microbatches / slice_.devices
  ranked = mesh_rule.choices(config.model, slice_, config.data.length, tokens)
  usable = [choice for choice in ranked if not choice.excluded]
  if exchange:
    usable = [choice for choice in usable if choice.exchange == exchange] or usable
  sizes = mesh_sizes(mesh) if mesh else usable[0].mesh
  if exchange is None and mesh:
    same = [c for c in usable if c.expert == sizes["expert"] and c.fsdp == sizes["fsdp"]]
    exchange = same[0].exchange if same else "Fsdp"
  exchange = exchange or usable[0].exchange
  return with_choice(config, exchange, sizes), rule_text(config, slice_, tokens, ranked)


def rule_text(config, slice_, tokens, ranked) -> str:
  if config.model.moe is None:
    return "No experts: weights are gathered."
  hidden = mesh_rule.tokens_to_hide_gather(config.model, slice_, config.data.length)
  moe = config.model.moe
  size = moe.num_experts * 6 * config.model.hidden_size * moe.expert_intermediate_size
  lines = [
    f"Which exchange: a layer's experts are {size / GIB:.2f} GiB; on {slice_.name} their gather hides "
    f"behind the layer's own compute from {hidden:,.0f} tokens per device on. With {tokens:,.0f} at a "
    "time, ms for one layer forward:",
    f"  {'exchange':9} {'mesh':22} {'compute':>8} {'weights':>8} {'tokens':>8}",
  ]
  for choice in ranked[:8]:
    mesh = f"fsdp={choice.fsdp},expert={choice.expert}"
    lines.append(f"  {choice.exchange:9} {mesh:22} {choice.compute * 1e3:8.2f} "
                 f"{choice.weights * 1e3:8.2f} {choice.tokens * 1e3:8.2f}  {choice.excluded}")  # fmt: skip
  lines.append(
    "The first is taken unless --mesh and --exchange say otherwise; --sweep compiles them."
  )
  return "\n".join(lines)


def say(text: str):
  """Progress, apart from the result."""
  print(text, file=sys.stderr, flush=True)


def write(path: str | None, text: str):
  if not path:
    return
  try:
    pathlib.Path(path).write_text(text)
  except OSError as error:
    raise ConfigError(f"cannot write {path}: {error.strerror}") from error
  say(f"wrote {path}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
