"""`tests/goldens/llada2_moe/attended.npz` is what torch computes from the weights beside it."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch_models import RELATIVES, load

from lladax.hub import family_of, load_folder

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "llada2_moe"


@pytest.mark.parametrize("name", ["logits", "block_causal_logits_bs8"])
def test_attended(tmp_path, name):
  assert family_of(json.loads((GOLDEN / "config.json").read_text())).name == "llada2"
  ids = {"mask_token_id": 125, "eos_token_id": 124, "pad_token_id": 124}
  loaded = load_folder(GOLDEN, ids=ids, dtype="float32", progress=False)
  relative = RELATIVES["glm4_moe"]
  relative.write(tmp_path, loaded.config, loaded.params)
  # Not only through our table: the experts lie in the file as they lie in the source.
  ours, theirs = (
    safetensors.numpy.load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN)
  )
  expert = "model.layers.1.mlp.experts.7.up_proj.weight"
  np.testing.assert_array_equal(ours[expert], theirs[expert])
  model = load(tmp_path, relative.model)
  tokens = torch.from_numpy(np.load(GOLDEN / "golden.npz")["tokens"].astype(np.int64))
  batch, length = tokens.shape
  block = torch.arange(length) // 8
  seen = block[:, None] >= block if name != "logits" else torch.ones(length, length, dtype=bool)
  mask = torch.zeros(batch, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
  with torch.no_grad():
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.numpy()
  attended = np.load(GOLDEN / "attended.npz")[name]
  np.testing.assert_allclose(logits, attended, rtol=0, atol=1e-5)
