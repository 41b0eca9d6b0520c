"""AdamW with clipping, and the learning-rate schedules: warm-up, then constant, cosine or WSD."""

from __future__ import annotations

import abc
import dataclasses

import jax
import optax

# Leaf names of parameters that scale or shift activations, or the choice of experts. By name and
# not by rank: with scanned layers the scale of a norm is [n, D].
NOT_DECAYED = ("scale", "bias", "expert_bias")


class LearningRate(abc.ABC):
  """The learning rate as a multiple of its peak, over the updates of a run."""

  @abc.abstractmethod
  def factor(self, steps: int) -> optax.Schedule:
    """Update count -> factor in [0, 1], for a run of `steps` updates.

    Raises:
      ValueError: if the phases do not fit into `steps`.
    """


def _one(count):
  del count
  return 1.0


def _after_warmup(warmup: int, schedule: optax.Schedule) -> optax.Schedule:
  if not warmup:
    return schedule
  # The first update has a factor of 1 / warmup: one with 0 would be lost.
  rising = optax.linear_schedule(1.0 / warmup, 1.0, max(warmup - 1, 1))
  return optax.join_schedules([rising, schedule], [warmup])


def _check(schedule):
  if schedule.warmup < 0:
    raise ValueError(f"warmup is a number of updates, at least 0; got {schedule.warmup}")
  if not 0 <= getattr(schedule, "final", 0.0) <= 1:
    raise ValueError(f"final is a fraction of the peak in [0, 1]; got {schedule.final}")


def _check_warmup(schedule, steps: int):
  if schedule.warmup >= steps:
    raise ValueError(
      f"a run of {steps} updates ends within the warm-up of {schedule.warmup}; lower "
      f"warmup or raise steps"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(LearningRate):
  """Linear warm-up from 0 over `warmup` updates, then 1."""

  warmup: int = 0

  def __post_init__(self):
    _check(self)

  def factor(self, steps: int) -> optax.Schedule:
    _check_warmup(self, steps)
    return _after_warmup(self.warmup, optax.constant_schedule(1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineDecay(LearningRate):
  """Linear warm-up from 0, then half a cosine from 1 to `final` as the run ends."""

  warmup: int = 0
  final: float = 0.1  # as a fraction of the peak

  def __post_init__(self):
    _check(self)

  def factor(self, steps: int) -> optax.Schedule:
    _check_warmup(self, steps)
    return _after_warmup(
      self.warmup, optax.cosine_decay_schedule(1.0, steps - self.warmup, alpha=self.final)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wsd(LearningRate):
  """Warm-up, stable, decay: linear to 1, constant, then linear to `final` as the run ends.

  Attributes:
    warmup: updates of the linear warm-up.
    decay_fraction: share of all updates that decay; used when `decay` is None.
    decay: updates that decay.
    final: last factor, as a fraction of the peak.
  """

  warmup: int = 0
  decay_fraction: float = 0.2
  decay: int | None = None
  final: float = 0.0

  def __post_init__(self):
    _check(self)
    if not 0 <= self.decay_fraction <= 1:
      raise ValueError(f"decay_fraction lies in [0, 1]; got {self.decay_fraction}")
    if self.decay is not None and self.decay < 0:
      raise ValueError(f"decay is a number of updates, at least 0; got {self.decay}")

  def factor(self, steps: int) -> optax.Schedule:
    decay = round(steps * self.decay_fraction) if self.decay is None else self.decay
    stable = steps - self.warmup - decay
    if stable < 0:
      raise ValueError(
        f"a run of {steps} updates is shorter than the warm-up of {self.warmup} and the decay of "
        f"{decay} of {self}; lower them or raise steps"
      )
    falling = optax.linear_schedule(1.0, self.final, decay) if decay else _one
    return _after_warmup(self.warmup, optax.join_schedules([_one, falling], [stable]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW (Loshchilov and Hutter, 2019) with the constants usual for language models.

  Attributes:
    peak: highest learning rate.
    schedule: how the learning rate goes over the run.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled, scaled by the learning rate; not on norms and biases.
    clip: highest global norm of the gradient; None does not clip.
  """

  peak: float = 1e-3
  schedule: LearningRate = Wsd()
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float | None = 1.0

  def __post_init__(self):
    for name, low, high in (("b1", 0, 1), ("b2", 0, 1)):
      value = getattr(self, name)
      if not low <= value < high:
        raise ValueError(f"{name} lies in [{low}, {high}); got {value}")
    for name in ("peak", "eps", "weight_decay"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise ValueError(f"{name} is finite and at least 0; got {getattr(self, name)}")
    if self.clip is not None and self.clip <= 0:
      raise ValueError(f"clip is positive, or None to switch it off; got {self.clip}")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Number of updates made so far -> learning rate of the next, for a run of `steps` updates."""
  factor = config.schedule.factor(steps)
  return lambda count: config.peak * factor(count)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Clipping, then AdamW.

  Raises:
    ValueError: if the phases of the schedule do not fit into `steps`.
  """
  if steps < 1:
    raise ValueError(f"a run has at least one step; got steps={steps}")
  adamw = optax.adamw(
    learning_rate(config, steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decay_mask,
  )
  if config.clip is None:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def decay_mask(params):
  """True where weight decay applies: by the name of the parameter, whatever its rank."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _leaf_name(path) not in NOT_DECAYED, params
  )


def _leaf_name(path) -> str:
  # Boxed parameters end in an attribute of the box; the name is the last key of a dict.
  keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
  return keys[-1] if keys else ""
