"""Fast-dLLM's own decodings (arXiv 2505.22618), token for token and pass for pass."""

import json

import numpy as np
import pytest
from folders import GOLDENS, like, read

from lladax.infer import DualCache, NoCache, PrefixCache, SamplerConfig, Threshold, generate
from lladax.models import Denoiser, abstract_params

CACHES = {"plain": NoCache(), "prefix": PrefixCache(), "dual": DualCache()}


@pytest.mark.parametrize("rule", ["", "_thr"])
@pytest.mark.parametrize("cache", CACHES)
def test_decoding(cache, rule):
  _, config, _, params, _ = read("llada_dense")
  golden = np.load(GOLDENS / "llada_dense" / "fastdllm.npz")
  options = json.loads(str(golden[f"{cache}{rule}_args"]))
  if "threshold" in options:
    # Fast-dLLM writes what reaches the threshold, and else the most confident one alone.
    options["unmask"] = Threshold(options.pop("threshold"), slack=0.0)
  result = generate(
    Denoiser(config),
    like(abstract_params(config), params),
    golden["prompt"].tolist(),
    SamplerConfig(cache=CACHES[cache], **options),
    mask_id=config.mask_token_id,
    eos_id=config.eos_token_id,
    pad_id=config.pad_token_id,
  )
  assert [result.row(0)] == golden[f"{cache}{rule}_out"].tolist()
  # After the pass that fills a cache Fast-dLLM makes another one before it looks for masks, even
  # where the first has written the whole block. We look first.
  written_at = result.revealed_at[0][result.revealed_at[0] >= 0].reshape(4, 8)
  needless = int((np.ptp(written_at, axis=1) == 0).sum()) if cache != "plain" else 0
  assert result.nfe[0] + needless == golden[f"{cache}{rule}_nfe"]
  assert needless == (4 if rule and cache != "plain" else 0)


def test_the_caches_differ_somewhere():
  golden = np.load(GOLDENS / "llada_dense" / "fastdllm.npz")
  assert len({golden[f"{cache}_out"].tobytes() for cache in CACHES}) > 1
