"""The sides of `benchmark_decode`: lladax, and LLaDA's plain loop in torch, with the same weights.

Each lives in a process of its own and imports its framework there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What all sides share."""

  size: str
  model: str | None
  prompt: str | None
  prompt_length: int
  gen_length: int
  block_length: int
  steps: int
  batch: int
  folder: str


def network(chosen: Setting):
  """(config, params, tokenizer), the same on every call and in every process."""
  import jax

  import lladax
  from lladax.models import init_params, llada_moe_7b_a1b, proxy_25m

  if chosen.model is not None:
    model = lladax.load(chosen.model, progress=False)
    return model.config, model.params, model.tokenizer
  if chosen.size == "7b":
    config = llada_moe_7b_a1b(param_dtype="bfloat16")
  else:
    config = proxy_25m(mask_token_id=8191, max_position_embeddings=4096)
  return config, jax.jit(functools.partial(init_params, config))(jax.random.key(0)), None


def prompts(chosen: Setting, config, tokenizer) -> list[list[int]]:
  import numpy as np

  if chosen.prompt is not None:
    if tokenizer is None:
      raise ValueError("--prompt is text: it needs a --model with a tokenizer")
    return [tokenizer.encode(chosen.prompt)] * chosen.batch
  shape = chosen.batch, chosen.prompt_length
  return np.random.default_rng(0).integers(2, min(1000, config.vocab_size // 2), shape).tolist()


# --- lladax ---


class Ours:
  """All sides of lladax; they share the weights on the device."""

  def __init__(self, chosen: Setting, names: list[str]):
    from lladax import host
    from lladax.config import override
    from lladax.infer import SamplerConfig
    from lladax.models import for_inference

    host.keep_memory()
    self.config, self.params, tokenizer = network(chosen)
    self.prompts = prompts(chosen, self.config, tokenizer)
    lengths = {field: getattr(chosen, field) for field in ("gen_length", "block_length", "steps")}
    self.sides, prepared = {}, {}
    for name in names:
      fields = [field for field in name.split() if not field.startswith("weights=")]
      weights = dict(f.split("=") for f in name.split() if f not in fields).get("weights")
      if weights not in prepared:
        prepared[weights] = for_inference(self.config, self.params, weights=weights)
      sampler = override(SamplerConfig(**lengths), fields)
      self.sides[name] = sampler, *prepared[weights]
    del self.params

  def answer(self, name: str):
    from lladax.infer import generate
    from lladax.models import Denoiser

    sampler, config, params = self.sides[name]
    return generate(
      Denoiser(config),
      params,
      self.prompts,
      sampler,
      mask_id=config.mask_token_id,
      eos_id=config.eos_token_id,
      pad_id=config.pad_token_id,
    )

  def run(self, name: str) -> dict:
    start = time.perf_counter()
    result = self.answer(name)
    seconds = time.perf_counter() - start
    begins = [len(prompt) for prompt in self.prompts]
    rows = [result.row(r)[begin:] for r, begin in enumerate(begins)]
    return {
      "seconds": seconds,
      "tokens": sum(len(answer) for answer in result.answers),
      "nfe": int(max(result.nfe)),
      "rows": rows,
    }

  def device(self) -> str:
    import jax

    return jax.devices()[0].device_kind

  def floor(self, name: str) -> dict:
    from experiments.benchmark_decode_floor import floor

    sampler, config, params = self.sides[name]
    return floor(config, params, sampler, self.answer(name), len(self.prompts[0]))

  def ceilings(self) -> dict:
    from experiments.benchmark_decode_floor import ceilings

    return ceilings(next(iter(self.sides.values()))[1].dtype)


# --- torch ---


class Torch:
  """LLaDA's loop with the experts in one of torch's ways."""

  def __init__(self, chosen: Setting, names: list[str]):
    import torch

    self.torch, self.chosen, (self.experts,) = torch, chosen, names
    with open(os.path.join(chosen.folder, "decode.json")) as file:
      self.ids = json.load(file)
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.model = self._load()
    self.prompts = torch.tensor(self.ids["prompts"], device=self.device)
    batch, length = self.prompts.shape
    side = length + chosen.gen_length
    self.seen = torch.ones(batch, 1, side, side, dtype=torch.bool, device=self.device)

  def _load(self):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(
      self.chosen.folder,
      dtype=getattr(self.torch, self.ids["dtype"]),
      experts_implementation=self.experts,
      attn_implementation="sdpa",
    )
    return model.to(self.device).eval()

  def run(self, name: str) -> dict:
    torch = self.torch
    start = time.perf_counter()
    with torch.no_grad():
      canvas = self._decode()
    if self.device.type == "cuda":
      torch.cuda.synchronize()
    rows = canvas[:, self.prompts.shape[1] :].tolist()
    seconds = time.perf_counter() - start
    eos = self.ids["eos"]
    tokens = sum(row.index(eos) if eos in row else len(row) for row in rows)
    return {"seconds": seconds, "tokens": tokens, "nfe": self.chosen.steps, "rows": rows}

  def _decode(self):
    torch, chosen, mask = self.torch, self.chosen, self.ids["mask"]
    width, length = chosen.block_length, self.prompts.shape[1]
    blocks = chosen.gen_length // width
    steps = chosen.steps // blocks
    blank = torch.full((len(self.prompts), chosen.gen_length), mask, device=self.device)
    x = torch.cat([self.prompts, blank], 1)
    for block in range(blocks):
      end = length + (block + 1) * width
      for step in range(steps):
        logits = self.model(x, attention_mask=self.seen, use_cache=False).logits
        logits[..., mask] = -torch.inf  # lladax never writes MASK either
        probability, drawn = torch.softmax(logits.float(), -1).max(-1)
        free = x == mask
        free[:, end:] = False
        confidence = torch.where(free, probability, -torch.inf)
        share = width // steps + (step < width % steps)
        written = confidence.topk(share, dim=1).indices
        x.scatter_(1, written, drawn.gather(1, written))
    return x


def write_folder(chosen: Setting):
  """The weights as a Qwen3-MoE of `transformers`, for torch. Runs on the host, in its own process."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax
  import numpy as np
  from safetensors.numpy import save_file
  from transformers import Qwen3MoeConfig

  from lladax.hub.export import named_tensors
  from lladax.hub.names import Names, rows
  from lladax.hub.plan import named_leaves

  config, params, tokenizer = network(chosen)
  named = named_tensors(rows(Names(), config, ()), named_leaves(jax.device_get(params)))
  tensors = {name: np.ascontiguousarray(tensor) for name, tensor in named}
  save_file(tensors, os.path.join(chosen.folder, "model.safetensors"), metadata={"format": "pt"})
  Qwen3MoeConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.hidden_size,
    num_hidden_layers=config.num_hidden_layers,
    num_attention_heads=config.num_attention_heads,
    num_key_value_heads=config.kv_heads,
    head_dim=config.head_size,
    rope_theta=config.rope_theta,
    rms_norm_eps=config.rms_norm_eps,
    max_position_embeddings=config.max_position_embeddings,
    moe_intermediate_size=config.moe.expert_intermediate_size,
    num_experts=config.moe.num_experts,
    num_experts_per_tok=config.moe.num_experts_per_tok,
    norm_topk_prob=config.moe.router.norm_topk_prob,
    tie_word_embeddings=config.tie_word_embeddings,
    pad_token_id=None,
    bos_token_id=None,
  ).save_pretrained(chosen.folder)
  ids = {
    "prompts": prompts(chosen, config, tokenizer),
    "mask": config.mask_token_id,
    "eos": config.eos_token_id,
    "dtype": config.dtype,
  }
  with open(os.path.join(chosen.folder, "decode.json"), "w") as file:
    json.dump(ids, file)
