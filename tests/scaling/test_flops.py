"""Useful FLOPs by hand, and against XLA's count of a real forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lladax.models import Denoiser, abstract_params, llada2_mini, llada_moe_7b_a1b, tiny
from lladax.scaling import token_flops, train_flops
from lladax.scaling.chips import peak_flops
from lladax.scaling.flops import pass_flops


@pytest.mark.quick
def test_the_7b_by_hand():
  model = llada_moe_7b_a1b()
  found = token_flops(model, 4096)
  assert found.projections == 16 * 2 * 4 * 2048 * 2048
  assert found.scores == 16 * 4 * 4096 * 2048
  assert found.experts == 16 * 8 * 6 * 2048 * 1024
  assert found.router == 16 * 2 * 2048 * 64
  assert found.head == 2 * 2048 * 157_184
  assert found.dense == 0
  assert train_flops(model, 4096) == pytest.approx(10.0e9, rel=1e-3)


def test_shared_experts_and_dense_first_layers():
  model = llada2_mini()
  found = token_flops(model, 4096)
  assert found.experts == 19 * (8 + 1) * 6 * 2048 * 512
  assert found.dense == 1 * 6 * 2048 * 5120
  assert found.projections == 20 * 2 * 2048 * 128 * (16 + 4 + 4 + 16)


def test_causal_models_look_at_half_and_half_the_positions_need_half_the_head():
  model = tiny()
  causal = dataclasses.replace(model, causal=True)
  assert token_flops(causal, 127).scores == token_flops(model, 64).scores
  assert token_flops(model, 64, supervised=0.5).head == token_flops(model, 64).head / 2
  assert token_flops(model, 64, keys=10).scores == token_flops(model, 10).scores


# Wide enough that what is no matrix product (norms, rotary, softmax) is little.
DENSE = tiny(
  vocab_size=512, hidden_size=512, num_hidden_layers=1, num_attention_heads=4,
  moe=None, intermediate_size=1024,
)  # fmt: skip
GROUPED = dataclasses.replace(DENSE, num_key_value_heads=2)


@pytest.mark.parametrize("model", [DENSE, GROUPED], ids=["dense", "grouped"])
def test_against_xla(model):
  rows, length = 2, 64

  def forward(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return Denoiser(model)(params, tokens, positions, jnp.ones_like(tokens))

  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  compiled = jax.jit(forward).lower(abstract_params(model), tokens).compile()
  useful = token_flops(model, length).total * rows * length
  assert compiled.cost_analysis()["flops"] == pytest.approx(useful, rel=0.02)


@pytest.mark.parametrize("model", [DENSE, GROUPED], ids=["dense", "grouped"])
def test_a_pass_of_decoding_against_xla(model):
  """Of the last layer, here the only one, nothing but keys and values is of all columns."""
  rows, length, wanted = 2, 64, 16
  model = dataclasses.replace(model, stacked=False)

  def read(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    at = jnp.array([8, 40])
    return Denoiser(model).read(
      params, tokens, positions, jnp.ones_like(tokens), at=at, width=wanted, keep=True
    )

  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  compiled = jax.jit(read).lower(abstract_params(model), tokens).compile()
  useful = rows * pass_flops(model, length, keys=length, wanted=wanted)
  assert compiled.cost_analysis()["flops"] == pytest.approx(useful, rel=0.03)


def test_peaks_of_devices_by_the_names_that_jax_gives_them():
  assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12
  assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 == peak_flops("NVIDIA H200")
  assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
  assert peak_flops("cpu") is None and peak_flops("NVIDIA GeForce RTX 4090") is None
