"""What a run carries from step to step, and where each part of it lies on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from lladax.sharding import param_shardings

ROUTER = "router"  # the name of a routed layer's parameter [D, E]


@struct.dataclass
class TrainState:
  """Arrays only; plain, not boxed.

  Attributes:
    step: int32[], steps taken, skipped ones included. Noise and data follow it.
    params: the parameters.
    opt_state: of the optax transformation; its own count leaves skipped steps out.
    skipped_in_a_row: int32[], the latest steps whose loss or gradient was not finite.
    skipped_total: int32[], all such steps.
    load_share: float32[n, E], the part of the slots of the latest step that each expert received,
      in every routed layer; None where there is none.
  """

  step: jax.Array
  params: optax.Params
  opt_state: optax.OptState
  skipped_in_a_row: jax.Array
  skipped_total: jax.Array
  load_share: jax.Array | None = None


# key -> parameters, boxed with their logical axis names or plain.
InitParams = Callable[[jax.Array], optax.Params]


def init_state(
  init_params: InitParams, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
  """A fresh state. Each device makes its own part; values do not depend on the mesh."""
  make = _from_key(init_params, optimizer)
  key = jax.random.key(seed)
  shardings = param_shardings(mesh, jax.eval_shape(make, key))
  return jax.jit(lambda key: nn.meta.unbox(make(key)), out_shardings=shardings)(key)


def abstract_state(
  init_params: InitParams, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Shapes, types and shardings of `init_state`, with nothing computed: what a restore needs."""
  make = _from_key(init_params, optimizer)
  key = jax.random.key(0)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    jax.eval_shape(lambda key: nn.meta.unbox(make(key)), key),
    param_shardings(mesh, jax.eval_shape(make, key)),
  )


def state_from(
  params: optax.Params, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
  """A fresh state with these parameters, which lie as in `abstract`; their memory is taken over."""
  make = jax.jit(
    functools.partial(_at_first, optimizer),
    out_shardings=state_shardings(abstract),
    donate_argnums=0,
  )
  return make(params)


def state_shardings(state: TrainState) -> TrainState:
  """The sharding of every leaf of a state or of an abstract state."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def _from_key(init_params: InitParams, optimizer: optax.GradientTransformation):
  return lambda key: _at_first(optimizer, init_params(key))


def _at_first(optimizer: optax.GradientTransformation, params: optax.Params) -> TrainState:
  # Made from boxed parameters, the moments carry the same axis names.
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    skipped_total=jnp.zeros((), jnp.int32),
    load_share=equal_shares(params),
  )


def equal_shares(params: optax.Params) -> jax.Array | None:
  """float32[n, E] of 1 / E, for the routers found in the parameters; None if there are none."""
  shapes = [
    leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(params))
    if getattr(path[-1], "key", None) == ROUTER
  ]
  if not shapes:
    return None
  ((layers, _, num_experts),) = shapes  # of all routed layers, stacked: [n, D, E]
  return jnp.full((layers, num_experts), 1 / num_experts, jnp.float32)
