"""Argmax over a vocabulary.

XLA:CPU's own carries a pair through one long scalar loop: 64 times 157,184 logits took it 23 ms, and
two stages 2.2 ms; 1.4 and 0.2 ms for 64 times 8192 (2-core AVX-512 machine, jax 0.10.2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 64


def argmax(x: jax.Array) -> jax.Array:
  """[..., V] -> int32[...]: where the largest is, the first of equals; the first NaN if there is one."""
  return lax.platform_dependent(x, cpu=_in_two_stages, default=_plain)


def _plain(x):
  return jnp.argmax(x, axis=-1).astype(jnp.int32)


def _in_two_stages(x):
  """First the group whose maximum is the largest, then the place in it."""
  rest = -x.shape[-1] % GROUP
  if rest:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)], constant_values=-jnp.inf)
  groups = x.reshape(*x.shape[:-1], -1, GROUP)
  which = _plain(groups.max(-1))
  group = jnp.take_along_axis(groups, which[..., None, None], axis=-2)[..., 0, :]
  return GROUP * which + _plain(group)
