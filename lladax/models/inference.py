"""From a model as it was trained or loaded to the form in which it decodes fastest."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax

from lladax.models.config import ModelConfig
from lladax.models.quantized import quantize_params
from lladax.models.transformer import init_variables
from lladax.moe.expert_parallel import Ring
from lladax.moe.local import INFERENCE
from lladax.sharding import mesh_in_use, param_shardings


def for_inference(config: ModelConfig, params, *, weights: str | None = None):
  """The same model for decoding, in the form of `inference_config` -> (config, params).

  Training such a model is an error: `fused_moe` has no derivative. On a mesh call it within
  `use_mesh`; parameters that lie otherwise are moved.

  Args:
    config: of the model.
    params: of `config`, its layers stacked.
    weights: of the experts, "int8" or "fp8"; None: in the dtype of computation.

  Raises:
    ValueError: for other weights, or where the model has no experts to quantise.
  """
  changed = inference_config(config)
  params = _placed(changed, _converted(changed, params))
  return changed, quantize_params(params, changed, weights) if weights else params


def inference_config(config: ModelConfig) -> ModelConfig:
  """The config of the same model for decoding, on the mesh in use.

  - Layers are no longer stacked. A loop over stacked layers copies each layer's weights before it
    multiplies by them, in every pass: three times the bytes that a step of few tokens has to move.
  - Weights are in the dtype of computation, once and not in every pass. Router, norms and biases of
    the router stay as they are.
  - Few tokens are computed by `kernels_pallas.fused_moe`.
  - On a mesh experts stay on their devices and tokens travel (`Ring`), where they divide.
  """
  changes = {"param_dtype": config.dtype, "stacked": False, "remat": "none"}
  if config.moe is not None:
    moe = dataclasses.replace(config.moe, implementation=INFERENCE)
    changes["moe"] = dataclasses.replace(moe, exchange=Ring()) if _experts_divide(moe) else moe
  return dataclasses.replace(config, **changes)


def _experts_divide(moe) -> bool:
  mesh = mesh_in_use()
  devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ("tensor", "expert"))
  return devices > 1 and moe.num_experts % devices == 0


@functools.partial(jax.jit, static_argnums=0)
def _converted(config: ModelConfig, params):
  """Each stack of layers [n, ...] as a tree by the layer's number, in the dtypes of the config."""
  params = dict(params)
  for name in ("dense_layers", "layers"):
    if name in params:
      count = jax.tree.leaves(params[name])[0].shape[0]
      params[name] = {
        f"layer_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], params[name]) for n in range(count)
      }
  return jax.tree.map(lambda x, like: x.astype(like.dtype), params, nn.meta.unbox(_boxed(config)))


def _boxed(config: ModelConfig):
  make = functools.partial(init_variables, config)
  return jax.eval_shape(make, jax.random.key(0))["params"]


def _placed(config: ModelConfig, params):
  """Where the exchange of the config wants them."""
  if mesh_in_use() is None:
    return params
  shardings = param_shardings(jax.sharding.get_mesh(), _boxed(config))
  return jax.tree.map(jax.device_put, params, shardings)
