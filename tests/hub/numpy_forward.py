"""The whole forward pass once more, in float64 NumPy, one token and one expert at a time.

It shares nothing with the code it checks but the names in the parameter tree and `ModelConfig`.
"""

import numpy as np


def forward(config, params, tokens, allowed=None):
  """Logits float64[B, L, V]; the prediction at i is for token i.

  Args:
    config: ModelConfig.
    params: dict of parameters by path, "layers/moe/router" and so on.
    tokens: int[B, L].
    allowed: bool[L, L], query by key; None: all.
  """
  return np.stack([_row(config, params, row, allowed) for row in np.asarray(tokens)])


def _row(config, params, tokens, allowed):
  L = len(tokens)
  params = {path: np.asarray(x, np.float64) for path, x in params.items()}
  allowed = np.ones((L, L), bool) if allowed is None else np.asarray(allowed)
  if config.causal:
    allowed = allowed & (np.arange(L)[:, None] >= np.arange(L))
  x = params["embed/embedding"][tokens]  # [L, D]
  for n in range(config.num_hidden_layers):
    routed = config.moe is not None and n >= config.first_k_dense
    stack = "layers/" if routed else "dense_layers/"
    index = n - config.first_k_dense if routed else n
    layer = {
      path.removeprefix(stack): value[index]
      for path, value in params.items()
      if path.startswith(stack)
    }
    eps = config.rms_norm_eps
    y = rms_norm(x, layer["attention_norm/scale"], eps)
    x = x + attention(config, layer, y, allowed)
    y = rms_norm(x, layer["ffn_norm/scale"], eps)
    x = x + (experts(config.moe, layer, y) if routed else swiglu(layer, "ffn", y))
  x = rms_norm(x, params["final_norm/scale"], config.rms_norm_eps)
  tied = config.tie_word_embeddings
  logits = x @ (params["embed/embedding"].T if tied else params["lm_head/kernel"])
  if config.shift:
    logits = np.concatenate([logits[:1], logits[:-1]])
  return logits


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def silu(x):
  return x / (1 + np.exp(-x))


def swiglu(layer, name, x):
  gate, up, down = (layer[f"{name}/{part}/kernel"] for part in ("gate", "up", "down"))
  return (silu(x @ gate) * (x @ up)) @ down


def attention(config, layer, x, allowed):
  def heads(name):
    y = np.einsum("ld,dnh->nlh", x, layer[f"attention/{name}/kernel"])
    return y + layer[f"attention/{name}/bias"][:, None] if config.attention_bias else y

  query, key, value = heads("query"), heads("key"), heads("value")
  if config.qk_norm:
    query = rms_norm(query, layer["attention/query_norm/scale"], config.rms_norm_eps)
    key = rms_norm(key, layer["attention/key_norm/scale"], config.rms_norm_eps)
  query, key = rotary(config, query), rotary(config, key)
  group = config.num_attention_heads // len(key)
  out = 0
  for n in range(config.num_attention_heads):
    scores = query[n] @ key[n // group].T / np.sqrt(query.shape[-1])
    weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    out = out + weights @ value[n // group] @ layer["attention/out/kernel"][n]
  return out


def rotary(config, x):
  """Each pair (j, j + size / 2) as one complex number, turned by its angle."""
  size = int(x.shape[-1] * config.partial_rotary_factor)
  half = size // 2
  angles = np.arange(x.shape[1])[:, None] / config.rope_theta ** (np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:size]) * np.exp(1j * angles)
  return np.concatenate([turned.real, turned.imag, x[..., size:]], -1)


def experts(moe, layer, x):
  out = np.zeros_like(x)
  for i, token in enumerate(x):
    for e, weight in route(moe, layer, token).items():
      gate, up = np.split(token @ layer["moe/gate_up"][e], 2)
      out[i] += weight * ((silu(gate) * up) @ layer["moe/down"][e])
  if moe.shared_expert_intermediate_size is not None:
    out = out + swiglu(layer, "shared_expert", x)
  return out


def route(moe, layer, token):
  """Weight by expert for one token."""
  router, k = moe.router, moe.num_experts_per_tok
  logits = token @ layer["moe/router"]
  sigmoid = type(router).__name__ == "SigmoidBias"
  if sigmoid:
    scores = 1 / (1 + np.exp(-logits))
  else:
    scores = np.exp(logits - logits.max())
    scores = scores / scores.sum()
  choice = scores + layer["moe/expert_bias"] if router.has_bias else scores
  candidates = range(len(scores))
  if sigmoid:
    groups = np.array_split(np.arange(len(scores)), router.n_group)
    best = sorted(groups, key=lambda group: -sum(sorted(choice[group])[-2:]))
    candidates = np.concatenate(best[: router.topk_group])
  chosen = sorted(candidates, key=lambda e: -choice[e])[:k]
  total = sum(scores[chosen]) if router.norm_topk_prob else 1
  return {e: scores[e] / total * router.routed_scaling_factor for e in chosen}
