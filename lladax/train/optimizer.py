"""The optimizer of a run: clipping, AdamW or Muon, decay, and a running average of the parameters."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lladax.train.expert_bias import BIAS, BiasUpdate
from lladax.train.muon import is_matrix, orthogonalized
from lladax.train.schedules import LearningRate, Wsd


class UpdateRule(abc.ABC):
  """How a gradient becomes an update. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def transformation(
    self, learning_rate: optax.Schedule, weight_decay: float, mask
  ) -> optax.GradientTransformation:
    """The rule with decoupled weight decay.

    Args:
      learning_rate: update count -> learning rate.
      weight_decay: multiplied by the learning rate.
      mask: params -> tree of bool, where it applies.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(UpdateRule):
  """AdamW (Loshchilov and Hutter, 2019) with the constants usual for language models.

  Attributes:
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment.
  """

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8

  def __post_init__(self):
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} lies in [0, 1); got {getattr(self, name)}")
    if not 0 <= self.eps < float("inf"):
      raise ValueError(f"eps is finite and at least 0; got {self.eps}")

  def transformation(self, learning_rate, weight_decay, mask):
    return optax.adamw(
      learning_rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=weight_decay, mask=mask
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(UpdateRule):
  """Muon (Jordan, 2024) for the matrices of the layers, another rule for everything else.

  Matrices are the projections of attention, feed-forward layers and experts: each layer's and each
  expert's own is orthogonalised, the heads of a projection together, gate and up of an expert
  apart. Embedding, head, router, norms and biases are not. Momentum takes half the memory of
  AdamW's moments. Its operations do not grow with the batch: a step of `proxy_25m` with 16 rows of
  256 took 1.7 times as long as with AdamW (float32, 2-core AVX-512 machine, not idle).

  Attributes:
    beta: decay rate of the momentum.
    nesterov: look one step ahead.
    ns_steps: Newton-Schulz iterations of the orthogonalisation.
    rms: an update of a D x F matrix is scaled by rms * sqrt(max(D, F)), which gives its entries
      this root mean square. 0.2 is about that of AdamW's updates, so that learning rate and weight
      decay can be AdamW's (Moonlight, arXiv 2502.16982, section 2.2).
    others: the rule of everything else.
  """

  beta: float = 0.95
  nesterov: bool = True
  ns_steps: int = 5
  rms: float = 0.2
  others: AdamW = AdamW()

  def __post_init__(self):
    if not 0 <= self.beta < 1:
      raise ValueError(f"beta lies in [0, 1); got {self.beta}")
    if self.ns_steps < 1:
      raise ValueError(f"ns_steps is at least 1; got {self.ns_steps}")
    if not 0 < self.rms < float("inf"):
      raise ValueError(f"rms is positive and finite; got {self.rms}")

  def transformation(self, learning_rate, weight_decay, mask):
    matrices = optax.chain(
      orthogonalized(beta=self.beta, nesterov=self.nesterov, ns_steps=self.ns_steps, rms=self.rms),
      optax.add_decayed_weights(weight_decay, mask),
      optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition(
      {
        "matrices": matrices,
        "others": self.others.transformation(learning_rate, weight_decay, mask),
      },
      lambda params: _by_path(params, lambda names: "matrices" if is_matrix(names) else "others"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """How parameters follow their gradients.

  Attributes:
    peak: highest learning rate.
    schedule: how the learning rate goes over the run.
    rule: `AdamW()` or `Muon()`.
    weight_decay: decoupled, scaled by the learning rate.
    not_decayed: names of parameters, or of what they lie in, that do not decay. By default what
      scales or shifts activations; OLMoE (arXiv 2409.02060) decays everything: `()`.
    clip: highest global norm of the gradient; None does not clip.
    ema: decay rate of a running average of the parameters, kept in float32, see `ema_params`; None:
      none is kept.
    bias_update: how the expert biases of routers that have them follow the load; None: they stay.
      They have no gradient, no moments and no decay in either case.

  Raises:
    ValueError: for numbers out of range.
  """

  peak: float = 1e-3
  schedule: LearningRate = Wsd()
  rule: UpdateRule = AdamW()
  weight_decay: float = 0.1
  # By name and not by rank: with scanned layers the scale of a norm is [n, D].
  not_decayed: tuple[str, ...] = ("scale", "bias")
  clip: float | None = 1.0
  ema: float | None = None
  bias_update: BiasUpdate | None = None

  def __post_init__(self):
    for name in ("peak", "weight_decay"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise ValueError(f"{name} is finite and at least 0; got {getattr(self, name)}")
    if self.clip is not None and self.clip <= 0:
      raise ValueError(f"clip is positive, or None to switch it off; got {self.clip}")
    if self.ema is not None and not 0 < self.ema < 1:
      raise ValueError(f"ema is a decay rate in (0, 1), or None; got {self.ema}")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Number of updates made so far -> learning rate of the next, for a run of `steps` updates."""
  factor = config.schedule.factor(steps)
  return lambda count: config.peak * factor(count)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
  """Clipping, the rule, and the running average.

  Its state has the same parts whether or not it clips, so that the next stage may do otherwise. The
  update takes `load_share` float32[n, E] where `bias_update` is used.

  Raises:
    ValueError: if the phases of the schedule do not fit into `steps`.
  """
  if steps < 1:
    raise ValueError(f"a run has at least one step; got steps={steps}")
  rule = config.rule.transformation(
    learning_rate(config, steps),
    config.weight_decay,
    lambda params: decay_mask(params, config.not_decayed),
  )
  update = config.bias_update
  biases = optax.set_to_zero() if update is None else update.transformation()
  return optax.chain(
    optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip),
    optax.partition(
      {"gradient": rule, "load": biases},
      lambda params: _by_path(params, lambda names: "load" if names[-1] == BIAS else "gradient"),
    ),
    optax.identity() if config.ema is None else average_params(config.ema),
  )


def decay_mask(params, not_decayed: tuple[str, ...] = OptimizerConfig.not_decayed):
  """True where weight decay applies: by the names on the way to a parameter, whatever its rank."""
  return _by_path(params, lambda names: not set(names) & {*not_decayed, BIAS})


def _by_path(params, function):
  """`function` of the names on the way to each parameter; a boxed one counts as one."""
  boxed = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
  return jax.tree_util.tree_map_with_path(
    lambda path, _: function([getattr(key, "key", "") for key in path] or [""]),
    params,
    is_leaf=boxed,
  )


# --- The running average ---


class EmaState(NamedTuple):
  """Updates made, and the average of the parameters in float32."""

  count: jax.Array
  ema: Any


def average_params(decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the parameters after each update; changes no update.

  It begins as the parameters, and its decay rate is min(decay, (1 + n) / (10 + n)) at update n: with
  the full rate from the start, it would for long be an average of what was not yet trained.
  """

  def init(params):
    copy = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    return EmaState(count=jnp.zeros((), jnp.int32), ema=copy)

  def update(updates, state, params=None):
    count = optax.safe_increment(state.count)
    rate = jnp.minimum(decay, (1 + count) / (10 + count))
    new = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda m, x: m + (1 - rate) * (x - m), state.ema, new)
    return updates, EmaState(count=count, ema=ema)

  return optax.GradientTransformation(init, update)


def ema_params(state) -> Any:
  """The running average in a `TrainState` or in the state of an optimizer, in float32.

  Raises:
    ValueError: if none is kept.
  """
  found = [
    part
    for part in jax.tree.leaves(
      getattr(state, "opt_state", state), is_leaf=lambda part: isinstance(part, EmaState)
    )
    if isinstance(part, EmaState)
  ]
  if not found:
    raise ValueError("no running average is kept; set optimizer.ema, for example to 0.9999")
  return found[0].ema
