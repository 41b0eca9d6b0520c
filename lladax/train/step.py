"""One optimizer step: noise for the global batch, gradients summed over microbatches, an update.

The step is made of functions, so that it knows no model and no objective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from lladax.sharding import constrain
from lladax.train.routing import router_load
from lladax.train.state import TrainState
from lladax.types import Scalar, Sums


class Prepare(Protocol):
  """What is decided for the global batch, before it is split: noise and the weights of the loss.

  `(batch, step int32[]) -> examples`, a tree whose every leaf has the B rows of the batch first.
  """

  def __call__(self, batch: Any, step: jax.Array) -> Any: ...


class Loss(Protocol):
  """`(params, examples, share) -> (loss float32[], Sums)` of some rows of the examples.

  Losses of a batch's parts add up to the loss of the batch: weights are divided before the split.
  A term that is a mean is multiplied by `share`, these rows' part of the batch. Where
  `make_train_step` is told how the load is known, `load_share` float32[n, E] or None comes last.
  """

  def __call__(self, params: Any, examples: Any, share: float) -> tuple[Scalar, Sums]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
  """How a loss comes to know how evenly the experts of the whole batch are used.

  Attributes:
    choose: (previous float32[n, E], count) -> the load that the loss is given, see
      `lladax.diffusion.BalanceLoad`.
    count: (params, examples) -> float32[n, E], the load of some rows, by a forward pass.
  """

  choose: Callable[[jax.Array, Callable[[], jax.Array | None]], jax.Array | None]
  count: Callable[[Any, Any], jax.Array]


def make_train_step(
  prepare: Prepare,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  microbatches: int = 1,
  learning_rate: optax.Schedule | None = None,
  shardings: TrainState | None = None,
  balance: Balance | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Sums]]:
  """A jitted `(state, batch) -> (state, metrics)`; the state given to it is donated.

  A step whose loss or gradient is not finite changes neither parameters nor optimizer: it is
  counted in the state, and in the metrics. Metrics are those of `loss`, and per step `loss`,
  `grad_norm` (before clipping), `skipped` (0 or 1), `skipped_in_a_row` and `learning_rate`; when a
  step is skipped, its loss and the metrics of `loss` are left out of the sums and the counts.

  Where the metrics of `loss` have the routers' load (`lladax.train.router_load`), its shares are
  kept in the state, and the optimizer gets them as the extra argument `load_share`.

  Args:
    prepare: see `Prepare`.
    loss: see `Loss`.
    optimizer: applied once per step.
    microbatches: parts the batch is split into to save memory; the result is the same.
    learning_rate: updates made so far -> learning rate, for the metrics only.
    shardings: of the state that is returned, see `state_shardings`; the compiler's choice if None.
    balance: how the loss gets the load of the experts; None: it does not.

  Raises:
    ValueError: at the first call, if the rows of the batch do not split evenly.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def train_step(state: TrainState, batch) -> tuple[TrainState, Sums]:
    examples = prepare(batch, state.step)
    known = () if balance is None else (_known_load(balance, state, examples, microbatches),)
    total, grads, metrics = sum_gradients(loss, state.params, examples, microbatches, *known)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

    load_share = router_load(metrics)
    updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params, load_share=load_share
    )
    params = optax.apply_updates(state.params, updates)
    skipped = 1 - finite.astype(jnp.int32)
    new_state = TrainState(
      step=state.step + 1,
      params=_select(finite, params, state.params),
      opt_state=_select(finite, opt_state, state.opt_state),
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
      skipped_total=state.skipped_total + skipped,
      load_share=None
      if state.load_share is None
      else _select(finite, load_share, state.load_share),
    )
    measured = _join(metrics, _once({"loss": total, "grad_norm": grad_norm}))
    measured = _select(finite, measured, jax.tree.map(jnp.zeros_like, measured))
    always = {"skipped": skipped, "skipped_in_a_row": new_state.skipped_in_a_row}
    if learning_rate is not None:
      always["learning_rate"] = learning_rate(state.step - state.skipped_total)
    return new_state, _join(measured, _once(always))

  out_shardings = None if shardings is None else (shardings, None)
  return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _known_load(balance: Balance, state: TrainState, examples, microbatches: int):
  """The load of the experts that the loss is given."""

  def count() -> jax.Array | None:
    if microbatches == 1:
      return None
    parts = split_rows(examples, microbatches)
    loads = jax.lax.map(lambda part: balance.count(state.params, part), parts)  # [m, n, E]
    load = jax.lax.stop_gradient(loads).sum(0)
    return load / jnp.maximum(load.sum(-1, keepdims=True), 1.0)

  return balance.choose(state.load_share, count)


def sum_gradients(loss: Loss, params, examples, microbatches: int, *known):
  """The loss of all rows, its gradient and its metrics, one microbatch after the other.

  `known`: further arguments of the loss, the same for all microbatches.

  Returns:
    (loss float32[], gradients like `params` and at least float32 when summed, `Sums`).
  """
  gradient = jax.value_and_grad(loss, has_aux=True)
  if microbatches == 1:
    (total, metrics), grads = gradient(params, examples, 1.0, *known)
    return total, grads, metrics

  def one_part(part):
    (total, metrics), grads = gradient(params, part, 1.0 / microbatches, *known)
    return total, jax.tree.map(_at_least_float32, grads), metrics

  parts = split_rows(examples, microbatches)
  like = jax.eval_shape(one_part, jax.tree.map(lambda leaf: leaf[0], parts))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
  total, _ = jax.lax.scan(
    lambda carry, part: (jax.tree.map(jnp.add, carry, one_part(part)), None), zeros, parts
  )
  return total


def split_rows(examples, microbatches: int):
  """[B, ...] -> [microbatches, B / microbatches, ...]; part m has the rows m, m + microbatches, ...

  Strided and not contiguous: the rows of a batch lie on the devices in contiguous blocks, so each
  part keeps an equal share on every device and nothing moves.

  Raises:
    ValueError: if the rows do not split evenly.
  """

  def split(leaf):
    rows = leaf.shape[0]
    if rows % microbatches:
      raise ValueError(f"{rows} rows do not split into {microbatches} microbatches")
    parts = leaf.reshape(rows // microbatches, microbatches, *leaf.shape[1:]).swapaxes(0, 1)
    return constrain(parts, None, "batch", *[None] * (leaf.ndim - 1))

  return jax.tree.map(split, examples)


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _select(choose: jax.Array, if_true, if_false):
  return jax.tree.map(lambda a, b: jnp.where(choose, a, b), if_true, if_false)


def _once(values: dict[str, jax.Array]) -> Sums:
  sums = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
  return Sums(sums, {name: jnp.ones((), jnp.float32) for name in values})


def _join(a: Sums, b: Sums) -> Sums:
  return Sums(a.sums | b.sums, a.counts | b.counts)
