"""Every published sampler decodes, and is what its name says."""

import dataclasses

import pytest
from test_caching import CONFIG, PROMPTS, run

from lladax.infer.published import PUBLISHED, dinfer, llada
from lladax.models import Denoiser


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_it_decodes(name):
  config = PUBLISHED[name](gen_length=32)
  config = dataclasses.replace(config, top_k=5)
  causal = config.block_length if type(config.cache).__name__ == "BlockCausal" else None
  result = run(config, network=Denoiser(CONFIG, block_length=causal))
  for row, prompt in enumerate(PROMPTS):
    written = result.row(row)
    assert written[: len(prompt)] == prompt and len(written) == len(prompt) + 32
    assert 0 < result.nfe[row] <= 32 + 16 * 2 + 2


def test_names_and_settings():
  assert (dinfer().gen_length, dinfer().block_length, dinfer().num_blocks) == (1024, 64, 16)
  assert llada(64) == llada(64, 64) != llada(64, 32)
  for name, make in PUBLISHED.items():
    assert make.__name__ == name and make.__doc__
    hash(make())
