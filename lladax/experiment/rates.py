"""What a step of an experiment is worth: useful operations, and the share of what devices can do."""

from __future__ import annotations

import jax
import numpy as np

from lladax.experiment.config import Experiment
from lladax.scaling.chips import peak_flops
from lladax.scaling.flops import train_flops


def supervised_share(config: Experiment) -> float:
  """The expected share of tokens that are masked, and therefore supervised."""
  times = config.objective.times(jax.random.key(0), 4096)
  return float(np.mean(1 - np.asarray(config.objective.schedule.alpha(times), np.float64)))


def useful_flops(config: Experiment) -> float:
  """Of a step: matrix products of forward and backward, the head on supervised tokens only.

  Operations that are made again for want of memory do not count, nor padding within experts.
  """
  per_token = train_flops(config.model, config.data.length, supervised=supervised_share(config))
  return per_token * config.data.batch_size * config.data.length


def amounts_per_step(config: Experiment, devices: list) -> dict[str, float]:
  """By name of the rate: how much of it a step is; over its seconds, the rate itself.

  `tokens_per_second`; per device `tokens_per_second_per_device` and `tflops_per_second_per_device`,
  useful ones; and `mfu`, model FLOPs utilisation, their share of the peak of bfloat16 products
  (PaLM, arXiv 2204.02311, appendix B), where the peak of the device is known.
  """
  tokens, flops = config.data.batch_size * config.data.length, useful_flops(config)
  amounts = {
    "tokens_per_second": tokens,
    "tokens_per_second_per_device": tokens / len(devices),
    "tflops_per_second_per_device": flops / len(devices) / 1e12,
  }
  peak = peak_flops(devices[0].device_kind)
  return amounts if peak is None else amounts | {"mfu": flops / len(devices) / peak}
