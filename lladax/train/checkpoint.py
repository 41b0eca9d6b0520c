"""Checkpoints of a run: state, data iterator, config and tokenizer in one atomic orbax save.

On disk, `<directory>/<step>/` has three parts: `params`, so that inference reads nothing else;
`train`, the optimizer and the counters; `run`, small files (config.json, iterators.json,
arrays.json and whatever the run adds, such as its tokenizer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from lladax import config as config_lib
from lladax.config import ConfigError
from lladax.train.arrays import CheckpointError, as_saved, describe_arrays, read_arrays
from lladax.train.state import TrainState

# (empty directory) -> None: writes files that belong to the run, such as a tokenizer.
WriteFiles = Callable[[epath.Path], object]


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
    keep_best: of these steps the one that is kept besides, or None while none stands out.
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
    keep_best: Callable[[Sequence[int]], int | None] | None = None,
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
    if keep_best is not None:
      policies.append(_KeepBest(keep_best))
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
    iterator_states = read_iterators(path)
    if missing := self._iterators.keys() - iterator_states.keys():
      raise CheckpointError(f"{path} has no state of {sorted(missing)}")
    return read_train_state(path, abstract), iterator_states

  def set_aside_after(self, step: int):
    """Renames later checkpoints `<step>.undone`: a run that is set back to `step` left them."""
    self.wait()
    for later in self.all_steps:
      if later > step:
        self._set_aside(str(later), "undone")

  def _set_aside(self, name: str, why: str = "damaged"):
    if jax.process_index() == 0:
      taken = len(list(self.directory.glob(f"{name}.{why}*")))
      (self.directory / name).rename(self.directory / f"{name}.{why}{taken or ''}")
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"checkpoint {name} set aside")
    self._manager.reload()


@dataclasses.dataclass(frozen=True)
class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
  choose: Callable[[Sequence[int]], int | None]

  def should_preserve(self, checkpoints, *, context):
    del context
    best = self.choose([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step == best for checkpoint in checkpoints]


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
    target = as_saved(step_path) if abstract is None else abstract(config)
    return LoadedParams(_read_item(step_path, "params", target), config, step_path)

  directory, names = (path.parent, [path.name]) if single else (inner, None)
  loaded, _ = _newest_whole(directory, read, names)
  if loaded is None:
    raise CheckpointError(f"there is no checkpoint in {directory}")
  return loaded


def saved_steps(path: epath.PathLike) -> list[int]:
  """The steps of the checkpoints in a workdir, ascending, damaged or not; none if there are none."""
  directory = _absolute(path) / "checkpoints"
  if not directory.exists():
    return []
  return sorted(int(path.name) for path in directory.iterdir() if re.fullmatch(r"\d+", path.name))


def read_train_state(path: epath.Path, abstract: TrainState) -> TrainState:
  """All of one checkpoint's state.

  Raises:
    CheckpointError: if its arrays have other names or shapes than `abstract`.
    OSError: if it is damaged.
  """
  items = {name: _read_item(path, name, item) for name, item in _items(abstract).items()}
  return TrainState(params=items["params"], **items["train"])


def read_iterators(path: epath.Path) -> dict[str, Any]:
  """What the iterators of a run were when a checkpoint was saved, by name."""
  return _read_json(path, "iterators.json")


def require_same_config(saved, config, where: epath.PathLike, *, may_differ: Collection[str] = ()):
  """Compares a config with the one (or its tree) found at `where`.

  Raises:
    ConfigError: one line that lists the fields that differ, `may_differ` and below left out.
  """
  allowed = tuple(may_differ)
  with contextlib.suppress(ConfigError):  # a class or field that is no more: compared as it stands
    # Fields that are newer than what was saved have their defaults.
    saved = config_lib.from_json(json.dumps(saved)) if isinstance(saved, dict) else saved
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


# --- Parts ---


def _items(state: TrainState) -> dict[str, Any]:
  """The state as what is saved apart."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return {"params": fields.pop("params"), "train": fields}


def _read_item(path: epath.Path, name: str, abstract):
  return read_arrays(path, name, abstract, _read_json(path, "arrays.json")[name])


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
