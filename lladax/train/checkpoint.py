"""Checkpoints of a run: state, data iterator, config and tokenizer in one atomic orbax save.

On disk, `<directory>/<step>/` has three parts: `params`, so that inference reads nothing else;
`train`, the optimizer and the counters; `run`, small files (config.json, iterators.json,
arrays.json and whatever the run adds, such as its tokenizer).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from lladax import config as config_lib
from lladax.config import ConfigError
from lladax.train.state import TrainState

# (empty directory) -> None: writes files that belong to the run, such as a tokenizer.
WriteFiles = Callable[[epath.Path], object]


class CheckpointError(ValueError):
  """No whole checkpoint, or one that does not hold what the program expects."""


class Stateful(Protocol):
  """What continues where it stopped: a data iterator, a window of metrics.

  The state is small, fits JSON and is the same on every process.
  """

  def get_state(self) -> Any: ...
  def set_state(self, state: Any) -> None: ...


class Checkpoints:
  """The checkpoints of one run, as a context manager that waits for the last save.

  Args:
    directory: holds a directory per step; made when missing.
    config: the config of the run, saved with every checkpoint and compared on restore.
    iterators: by name; their states are saved and restored with the arrays.
    files: by name; each writes a directory of its own into every checkpoint.
    keep: checkpoints that are kept, the newest ones.
    keep_every: multiples of this step are kept besides.
    may_differ: paths of config fields in which a run may differ from its checkpoint, with all
      below them.

  Raises:
    ValueError: if `keep` or `keep_every` is below 1.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    config: Any = None,
    iterators: Mapping[str, Stateful] | None = None,
    files: Mapping[str, WriteFiles] | None = None,
    keep: int = 2,
    keep_every: int | None = None,
    may_differ: Collection[str] = (),
  ):
    if keep < 1 or (keep_every is not None and keep_every < 1):
      raise ValueError(f"at least one checkpoint is kept; got {keep=}, {keep_every=}")
    self.directory = _absolute(directory)
    self.directory.mkdir(parents=True, exist_ok=True)
    self._config = config
    self._iterators = dict(iterators or {})
    self._files = dict(files or {})
    self._may_differ = may_differ
    for path in sorted(self.directory.glob("*.orbax-checkpoint-tmp*")):
      logging.warning("removing %s: the run was stopped before this save was whole", path)
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if keep_every is not None:
      policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *exception):
    self._manager.close()

  def wait(self):
    """Returns when the save that is under way is whole on disk."""
    self._manager.wait_until_finished()

  @property
  def all_steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState):
    """Copies the state to the host and returns; files are written in the background.

    The directory gets its name when everything is in it. A step that is there already is left.
    """
    if step in self._manager.all_steps():
      return
    items = _items(state)
    run = {
      "config.json": None if self._config is None else config_lib.to_tree(self._config),
      "iterators.json": {name: it.get_state() for name, it in self._iterators.items()},
      "arrays.json": {name: describe_arrays(item) for name, item in items.items()},
    }
    arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    args = ocp.args.Composite(**arrays, run=RunFilesArgs(run, self._files))
    self._manager.save(step, args=args, force=True)

  def restore(self, abstract: TrainState) -> TrainState | None:
    """The newest whole checkpoint, or None when there is none at all; sets the iterators.

    A newer one that is damaged is renamed `<step>.damaged`, with a warning that says why.

    Args:
      abstract: shapes, types and shardings, see `lladax.train.state.abstract_state`.

    Raises:
      ConfigError: if the checkpoint is of another config; the message lists the fields.
      CheckpointError: if checkpoints exist and none is whole, or its arrays have other names or
        shapes than `abstract`.
    """
    self.wait()
    restored, damaged = _newest_whole(self.directory, lambda path: self._read(path, abstract))
    if restored is None:
      return None
    for name in damaged:
      self._set_aside(name)
    state, iterator_states = restored
    for key, iterator in self._iterators.items():
      iterator.set_state(iterator_states[key])
    return state

  def _read(self, path: epath.Path, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    saved_config = _read_json(path, "config.json")
    if self._config is not None and saved_config is not None:
      require_same_config(saved_config, self._config, path, may_differ=self._may_differ)
    iterator_states = _read_json(path, "iterators.json")
    if missing := self._iterators.keys() - iterator_states.keys():
      raise CheckpointError(f"{path} has no state of {sorted(missing)}")
    items = {name: _read_arrays(path, name, item) for name, item in _items(abstract).items()}
    return TrainState(params=items["params"], **items["train"]), iterator_states

  def _set_aside(self, name: str):
    if jax.process_index() == 0:
      taken = len(list(self.directory.glob(f"{name}.damaged*")))
      (self.directory / name).rename(self.directory / f"{name}.damaged{taken or ''}")
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoint set aside")
    self._manager.reload()


class LoadedParams(NamedTuple):
  """Parameters for inference, and the checkpoint they are from."""

  params: Any
  config: Any
  path: epath.Path

  def files(self, name: str) -> epath.Path:
    """The directory that `files[name]` wrote, such as the tokenizer's."""
    return self.path / "run" / name


def load_params(path: epath.PathLike, abstract: Callable[[Any], Any] | None = None) -> LoadedParams:
  """Reads the parameters of the newest whole checkpoint, and nothing of the optimizer.

  Args:
    path: a workdir, its `checkpoints`, or the directory of one step.
    abstract: config -> tree of `ShapeDtypeStruct` with shardings; a type there converts. None:
      everything as saved, on the first device.

  Raises:
    CheckpointError: if there is no checkpoint, none is whole, or it holds other arrays.
    ConfigError: if the config names a class or field that is no more.
  """
  path = _absolute(path)
  if not path.exists():
    raise CheckpointError(f"{path} does not exist")
  single = (path / "run").exists() or (path / "params").exists()
  inner = path / "checkpoints" if (path / "checkpoints").exists() else path

  def read(step_path: epath.Path) -> LoadedParams:
    tree = _read_json(step_path, "config.json")
    config = None if tree is None else config_lib.from_json(json.dumps(tree))
    target = _as_saved(step_path) if abstract is None else abstract(config)
    return LoadedParams(_read_arrays(step_path, "params", target), config, step_path)

  directory, names = (path.parent, [path.name]) if single else (inner, None)
  loaded, _ = _newest_whole(directory, read, names)
  if loaded is None:
    raise CheckpointError(f"there is no checkpoint in {directory}")
  return loaded


def require_same_config(saved, config, where: epath.PathLike, *, may_differ: Collection[str] = ()):
  """Compares a config with the one (or its tree) found at `where`.

  Raises:
    ConfigError: one line that lists the fields that differ, `may_differ` and below left out.
  """
  allowed = tuple(may_differ)
  different = [
    line
    for line in config_lib.diff(saved, config)
    if not any(line.path == name or line.path.startswith(f"{name}.") for name in allowed)
  ]
  if different:
    fields = "; ".join(map(str, different))
    raise ConfigError(
      f"{where} is of another config ({fields}); choose another workdir, or the same values"
    )


# --- Which checkpoint is whole ---


def _newest_whole(
  directory: epath.Path,
  read: Callable[[epath.Path], Any],
  names: Collection[str] | None = None,
) -> tuple[Any, list[str]]:
  """What `read` gives for the newest whole step, and the names of the newer, damaged ones.

  (None, []) if there is no step at all.

  Raises:
    CheckpointError: if there are steps and all are damaged. Nothing was renamed.
  """
  if names is None:
    steps = [path.name for path in directory.iterdir() if re.fullmatch(r"\d+", path.name)]
    names = sorted(steps, key=int, reverse=True)
  damaged, reasons = [], []
  for name in names:
    path = directory / name
    try:
      result, reason = read(path), ""
    except (ConfigError, CheckpointError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # What a damaged file raises differs by file and by layer.
      result, reason = None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if _everywhere(not reason):
      return result, damaged
    damaged.append(name)
    reasons.append(f"{path} is damaged ({reason or 'on another process'})")
    logging.warning("%s; trying the one before it", reasons[-1])
  if reasons:
    raise CheckpointError(f"no checkpoint in {directory} is whole: {'; '.join(reasons)}")
  return None, []


def _everywhere(okay: bool) -> bool:
  if jax.process_count() == 1:
    return okay
  return bool(multihost_utils.process_allgather(np.array(okay)).all())


# --- Arrays ---


def _items(state: TrainState) -> dict[str, Any]:
  """The state as what is saved apart."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return {"params": fields.pop("params"), "train": fields}


def _read_arrays(path: epath.Path, name: str, abstract):
  saved = _read_json(path, "arrays.json")[name]
  _require_same_arrays(saved, abstract, path)
  handler = ocp.StandardCheckpointHandler()
  tree = handler.restore(path / name, args=ocp.args.StandardRestore(abstract))
  for leaf_name, (_, dtype, checksum) in describe_arrays(tree).items():
    # Orbax notices most damage, but not a changed bit within the numbers of an array.
    if dtype == saved[leaf_name][1] and checksum != saved[leaf_name][2]:
      raise OSError(f"array {leaf_name} of {name!r} is not what was saved")
  return tree


def _require_same_arrays(saved: dict[str, list], abstract, path: epath.Path):
  expected = {name: list(leaf.shape) for name, leaf in _named_leaves(abstract)}
  found = {name: entry[0] for name, entry in saved.items()}
  names = [name for name in found | expected if found.get(name) != expected.get(name)]
  if names:
    lines = [f"{name}: {found.get(name)} saved, {expected.get(name)} expected" for name in names]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    raise CheckpointError(f"{path} holds other arrays: {'; '.join(lines[:3])}{more}")


def _as_saved(path: epath.Path):
  tree = ocp.StandardCheckpointHandler().metadata(path / "params").tree
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree
  )


def describe_arrays(tree) -> dict[str, list]:
  """Shape, type and checksum of each array by its name, as JSON values.

  The checksum is over the bits of all elements, by position, modulo 2**32. It is computed where
  the array lies and does not depend on how it is sharded.
  """
  checksums = jax.device_get(_checksums(tree))
  return {
    name: [list(leaf.shape), str(leaf.dtype), int(checksum)]
    for (name, leaf), checksum in zip(_named_leaves(tree), checksums, strict=True)
  }


@jax.jit
def _checksums(tree) -> list[jax.Array]:
  return [_checksum(leaf) for leaf in jax.tree.leaves(tree)]


def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    bits = x
  else:
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned)
  mixed = bits.astype(jnp.uint32)
  for axis in range(bits.ndim):
    # Another odd multiplier per axis (of the 32-bit golden ratio), so that swaps show.
    factor = np.uint32((0x9E3779B1 * (2 * axis + 1)) % 2**32)
    mixed ^= factor * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  # The finalizer of MurmurHash3, a bijection: no change of one element is lost in the sum.
  mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _named_leaves(tree) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


# --- Small files ---


class RunFilesHandler(ocp.CheckpointHandler):
  """Writes `RunFilesArgs` within the atomic directory of a checkpoint, on one process."""

  def save(self, directory: epath.Path, args: RunFilesArgs):
    if jax.process_index() != 0:
      return
    for name, value in args.json_files.items():
      (directory / name).write_text(json.dumps(value, indent=1))
    for name, write in args.directories.items():
      (directory / name).mkdir()
      write(directory / name)

  def restore(self, directory: epath.Path, args=None):
    raise NotImplementedError("these files are read where they lie")


@ocp.args.register_with_handler(RunFilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class RunFilesArgs(ocp.args.CheckpointArgs):
  """JSON by file name, and functions that write directories."""

  json_files: dict[str, Any]
  directories: dict[str, WriteFiles]


def _read_json(path: epath.Path, name: str):
  return json.loads((path / "run" / name).read_text())


def _absolute(path: epath.PathLike) -> epath.Path:
  return epath.Path(path).expanduser().resolve()
