"""What a record says of the routers, against counts of single tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lladax.moe import TopKSoftmax, router_stats
from lladax.train.metrics import Metrics, read_records
from lladax.train.routing import SUMS, router_load, router_metrics
from lladax.types import RowGroups

LAYERS, T, E, K, G = 2, 40, 4, 2, 3


def step(seed: int):
  """Metrics of two microbatches, and the choices and entropies they are of."""
  rng = np.random.default_rng(seed)
  logits = np.float32(2 * rng.normal(size=(LAYERS, T, E)))
  logits[1, :, 3] = -50.0  # nobody goes to the last expert of the second layer
  group = rng.integers(0, 2, T)  # a group of three stays empty
  logits[0, group == 1, :2] = -50.0
  parts = []
  for rows in (slice(0, 15), slice(15, T)):
    stats = [
      router_stats(
        jnp.asarray(layer[rows]),
        TopKSoftmax()(jnp.asarray(layer[rows]), K),
        groups=RowGroups(jnp.asarray(group[rows]), G),
      )
      for layer in logits
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
    parts.append(router_metrics(stacked, 0.5, may_drop=True))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  chosen = np.argsort(-logits, -1)[..., :K]
  return jax.device_get(parts[0] + parts[1]), chosen, -(p * np.log(p + 1e-30)).sum(-1), group


def test_a_record_has_load_entropy_and_dead_experts_by_layer_and_noise_level(tmp_path):
  steps = [step(seed) for seed in range(3)]
  with Metrics(tmp_path, steps=3, every=3, show=False) as metrics:
    metrics.start(0)
    for i, (sums, *_) in enumerate(steps):
      metrics(i + 1, sums, None)
  (record,) = read_records(tmp_path)
  assert not set(SUMS) & set(record) and record["dropped_slots"] == 0
  chosen = np.concatenate([entry[1] for entry in steps], 1)  # [n, 3 T, k]
  entropy = np.concatenate([entry[2] for entry in steps], 1)
  group = np.concatenate([entry[3] for entry in steps])
  for layer in range(LAYERS):
    slots = np.bincount(chosen[layer].ravel(), minlength=E)
    np.testing.assert_allclose(record["expert_load"][layer], slots / slots.sum(), rtol=1e-6)
    np.testing.assert_allclose(
      record["load_max_over_mean"][layer], slots.max() / slots.mean(), rtol=1e-6
    )
    np.testing.assert_allclose(record["router_entropy"][layer], entropy[layer].mean(), rtol=1e-5)
    assert record["dead_experts"][layer] == (slots == 0).sum() == layer
    for g in range(2):
      slots = np.bincount(chosen[layer, group == g].ravel(), minlength=E)
      np.testing.assert_allclose(
        record["load_max_over_mean_by_t"][layer][g], slots.max() / slots.mean(), rtol=1e-6
      )
      np.testing.assert_allclose(
        record["router_entropy_by_t"][layer][g], entropy[layer, group == g].mean(), rtol=1e-5
      )
      assert record["dead_experts_by_t"][layer][g] == (slots == 0).sum()
    assert record["dead_experts_by_t"][layer][2] is None  # no row was there
  # Experts can be dead at one noise level alone.
  assert record["dead_experts_by_t"][0][1] == 2


def test_the_load_of_a_step_is_the_share_of_its_slots():
  sums, chosen, _, _ = step(0)
  load = router_load(sums)
  for layer in range(LAYERS):
    slots = np.bincount(chosen[layer].ravel(), minlength=E)
    np.testing.assert_allclose(load[layer], slots / slots.sum(), rtol=1e-6)


def test_a_window_without_a_finite_step_says_nothing_of_routers(tmp_path):
  nothing = jax.tree.map(np.zeros_like, step(0)[0])
  with Metrics(tmp_path, steps=1, every=1, show=False) as metrics:
    metrics.start(0)
    metrics(1, nothing, None)
  assert set(read_records(tmp_path)[0]) == {"step", "time", "tokens"}
