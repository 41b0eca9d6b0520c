"""The model card (README.md) of an exported folder: what the model is, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lladax import config as config_lib
from lladax.hub.families import family_for
from lladax.models import ModelConfig, count_parameters


def model_card(
  config: ModelConfig,
  *,
  name: str,
  family: str | None = None,
  training: Mapping[str, Any] | None = None,
  measured: Mapping[str, Any] | None = None,
  license: str | None = None,
) -> str:
  """A card in Markdown with the hub's YAML header.

  Args:
    config: the architecture.
    name: of the model, the title.
    family: whose names the folder uses; None: the family that has models of this config.
    training: setting -> value, such as steps, batch, learning rate, data.
    measured: quantity -> value with its unit, such as a held-out bound in bits per byte.
    license: the hub's name of it, e.g. "apache-2.0".
  """
  header = {"library_name": "lladax", "pipeline_tag": "text-generation"}
  if license is not None:
    header["license"] = license
  kind = "Autoregressive" if config.causal else "Masked-diffusion"
  shape = "dense transformer" if config.moe is None else "mixture of experts"
  family = family or family_for(config).name
  parts = [
    "---",
    *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
    "---",
    "",
    f"# {name}",
    "",
    f"{kind} language model, {shape}; weights and config.json in the format of {family}.",
    "",
    "| | |",
    "|---|---|",
    *_table(_summary(config)),
    "",
    "```python",
    "import lladax",
    f"model = lladax.load({name!r})",
    "```",
    "",
    "## Training",
    "",
    *(["| setting | value |", "|---|---|", *_table(training)] if training else ["Not recorded."]),
    "",
    "## Measured",
    "",
    *(["| quantity | value |", "|---|---|", *_table(measured)] if measured else ["Nothing yet."]),
    "",
    "## Config",
    "",
    "```json",
    json.dumps(config_lib.to_tree(config), indent=1),
    "```",
    "",
  ]
  return "\n".join(parts)


def _summary(config: ModelConfig) -> dict[str, Any]:
  count = count_parameters(config)
  summary = {
    "parameters": f"{count.total:,}",
    "active per token, with the head": f"{count.active:,}",
    "layers": config.num_hidden_layers,
    "width": config.hidden_size,
    "heads": f"{config.num_attention_heads} of {config.head_size}, {config.kv_heads} for keys",
    "context": config.max_position_embeddings,
    "vocabulary": config.vocab_size,
  }
  if config.moe is not None:
    moe = config.moe
    summary["experts"] = f"{moe.num_experts}, of which {moe.num_experts_per_tok} per token"
  ids = ("mask_token_id", "eos_token_id", "pad_token_id")
  return summary | {key: getattr(config, key) for key in ids}


def _table(rows: Mapping[str, Any]) -> list[str]:
  return [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]


def _cell(value: Any) -> str:
  return " ".join(str(value).replace("|", "\\|").split())
