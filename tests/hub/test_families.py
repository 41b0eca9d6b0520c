"""config.json and names of every family, both ways, and what is refused."""

import dataclasses
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from folders import (
  FAMILY_OF_GOLDEN,
  IDS,
  NAMES,
  abstract,
  config_json,
  export_tensors,
  import_tensors,
  model_of,
  read,
)

from lladax.hub.families import FAMILIES, family_for, family_of
from lladax.hub.family import architecture
from lladax.models import (
  ModelConfig,
  count_parameters,
  dream_7b,
  llada2_flash,
  llada2_mini,
  llada_8b,
  llada_moe_7b_a1b,
  qwen2_5,
  tiny,
)
from lladax.moe import MoEConfig, Ring, SigmoidBias, TopKSoftmax

BY_NAME = {family.name: family for family in FAMILIES}
PRESETS = {
  "llada_moe": llada_moe_7b_a1b(),
  "llada": llada_8b(),
  "llada2": llada2_mini(),
  "llada2 flash": llada2_flash(),
  "dream": dream_7b(),
  "qwen2": qwen2_5("7b"),
  "qwen2 tied": qwen2_5("0.5b"),
}


def ids_of(config: ModelConfig) -> dict:
  ids = {key: getattr(config, key) for key in IDS}
  return {key: value for key, value in ids.items() if value is not None}


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_are_the_same_bytes(name):
  family, config, tensors, params, _ = read(name)
  assert family.name == FAMILY_OF_GOLDEN[name]
  back = export_tensors(family, config, params, tensors)
  assert back.keys() == tensors.keys()
  for key, tensor in tensors.items():
    assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape)
    assert back[key].tobytes() == tensor.tobytes()


def fused(tensors: dict, joined: bool) -> dict:
  """Experts as dInfer joins them (w1, w2), or as dFactory stacks them."""
  experts = [name for name in tensors if ".experts." in name]
  fused = {name: x for name, x in tensors.items() if name not in experts}
  layers = {name.split("experts.")[0] for name in experts}
  for layer in layers:
    number = 1 + max(int(re.search(r"experts\.(\d+)", name)[1]) for name in experts)

    def stack(part, layer=layer, number=number):
      return np.stack([tensors[f"{layer}experts.{e}.{part}_proj.weight"] for e in range(number)])

    if joined:
      fused[layer + "w1"] = np.concatenate([stack("gate"), stack("up")], axis=1)
      fused[layer + "w2"] = stack("down")
    else:
      fused |= {f"{layer}experts.{part}_proj": stack(part) for part in ("gate", "up", "down")}
  return fused


@pytest.mark.parametrize(
  ("name", "joined", "says"),
  [
    ("lladamoe_tiny", True, {"architectures": ["FusedLLaDAMoEModelLM"]}),
    ("llada2_moe", False, {"model_type": "llada2_moe_veomni"}),
  ],
)
def test_fused_experts_are_the_same_model(name, joined, says):
  family, config, tensors, params, _ = read(name)
  assert family_of({**config_json(name), **says}) is family
  other = fused(tensors, joined)
  assert len(other) < len(tensors)
  values = import_tensors(family, config, other)
  for path, value in params.items():
    np.testing.assert_array_equal(values[path], value)
  back = export_tensors(family, config, values, other)
  assert {key: x.tobytes() for key, x in back.items()} == {
    key: x.tobytes() for key, x in other.items()
  }
  # Without the names of a folder, the published form.
  assert export_tensors(family, config, values).keys() == tensors.keys()


def test_llada_moe_has_the_published_tensors():
  config = PRESETS["llada_moe"]
  shapes = tensor_shapes(config)
  assert len(shapes) == 3219
  layer = "model.layers.15."
  for name, shape in {
    "model.embed_tokens.weight": (157_184, 2048),
    "lm_head.weight": (157_184, 2048),
    layer + "self_attn.o_proj.weight": (2048, 2048),
    layer + "self_attn.k_norm.weight": (128,),
    layer + "mlp.gate.weight": (64, 2048),
    layer + "mlp.experts.63.up_proj.weight": (1024, 2048),
    layer + "mlp.experts.63.down_proj.weight": (2048, 1024),
  }.items():
    assert shapes[name] == shape
  mini = tensor_shapes(PRESETS["llada2"])
  assert mini["model.layers.1.attention.query_key_value.weight"] == (3072, 2048)
  assert "lm_head.weight" not in tensor_shapes(PRESETS["qwen2 tied"])


def tensor_shapes(config) -> dict:
  shapes = {path: x.shape for path, x in abstract(config).items()}
  found = {}
  for row in family_for(config).rows(config):
    expected = row.tensor_shapes(shapes)
    for _, _, names in row.names():
      found.update(zip(names, expected, strict=True))
  return found


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
  config, family = PRESETS[name], BY_NAME[name.split()[0]]
  assert family_for(config) is family
  said = family.hf_config(config)
  assert family_of(said) is family
  back = family.model_config(said, ids=ids_of(config), dtype=config.dtype)
  assert architecture(back) == architecture(config)
  assert back.dtype == back.param_dtype == "bfloat16"
  elements = sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())
  assert elements == count_parameters(config).total
  published = dict(family.published_ids)
  assert published == ids_of(config)


# What is known of the released files, keys that we do not read left out.
RELEASED = {
  "llada_moe": {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "vocab_size": 157_184,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "expert_intermediate_size": 1024,
    "dense_intermediate_size": 8192,
    "shared_expert_intermediate_size": None,
    "moe_layer_freq": [1] * 16,
    "hidden_act": "silu",
    "qk_layernorm": True,
    "partial_rotary_factor": 1,
    "rope_theta": 50_000,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "clip_qkv": None,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
  },
  "llada2": {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "vocab_size": 157_184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 512,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "rotary_dim": 64,
    "rope_theta": 600_000,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 16_384,
    "use_bias": False,
    "use_qkv_bias": False,
  },
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_the_presets(name):
  config = RELEASED[name]
  ids = BY_NAME[name].published_ids
  model = family_of(config).model_config(config, ids=ids, dtype="bfloat16")
  assert architecture(model) == architecture(PRESETS[name])


@pytest.mark.parametrize(
  ("name", "changes", "fields"),
  [
    ("lladamoe_tiny", {"qk_layernorm": False}, {"qk_norm": False}),
    ("lladamoe_tiny", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ("lladamoe_tiny", {"num_key_value_heads": 2}, {"num_key_value_heads": 2}),
    ("lladamoe_tiny", {"moe_router_enable_expert_bias": True}, {"moe.router.expert_bias": True}),
    (
      "lladamoe_tiny",
      {"shared_expert_intermediate_size": 24},
      {"moe.shared_expert_intermediate_size": 24},
    ),
    ("lladamoe_tiny", {"moe_layer_freq": [0, 1]}, {"first_k_dense": 1, "intermediate_size": 96}),
    ("llada_dense", {"include_qkv_bias": True}, {"attention_bias": True}),
    ("llada_dense", {"weight_tying": True}, {"tie_word_embeddings": True}),
    ("llada_dense", {"n_kv_heads": 1, "mlp_hidden_size": None},
     {"num_key_value_heads": 1, "intermediate_size": 128}),
    ("llada2_moe", {"use_qkv_bias": True}, {"attention_bias": True}),
    ("llada2_moe", {"num_shared_experts": 2}, {"moe.shared_expert_intermediate_size": 64}),
    ("llada2_moe", {"num_shared_experts": None}, {"moe.shared_expert_intermediate_size": None}),
    ("llada2_moe", {"first_k_dense_replace": 0}, {"first_k_dense": 0, "intermediate_size": None}),
    ("llada2_moe", {"num_experts_per_tok": 1},
     {"moe.num_experts_per_tok": 1, "moe.router.norm_topk_prob": False}),
    ("llada2_moe", {"partial_rotary_factor": None, "rotary_dim": 2},
     {"partial_rotary_factor": 0.25}),
    ("llada2_moe", {"n_group": None, "topk_group": None},
     {"moe.router.n_group": 1, "moe.router.topk_group": 1}),
    ("dream", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ("dream", {"head_dim": 16}, {"head_dim": 16}),
    ("qwen2_ar", {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
  ],
)  # fmt: skip
def test_options(name, changes, fields):
  """One key moves its fields and no others, and goes back into a config.json and tensors."""
  before, config = read(name)[1], model_of(config_json(name), **changes)
  flat = flatten(architecture(config))
  assert {key: flat[key] for key in fields} == fields
  same = flatten(architecture(before))
  assert {key for key in flat if flat[key] != same[key]} == fields.keys()
  family = family_for(config)
  assert family.name == FAMILY_OF_GOLDEN[name]
  assert architecture(model_of(family.hf_config(config))) == architecture(config)
  chance = np.random.default_rng(0)
  params = {
    path: chance.standard_normal(x.shape).astype(x.dtype) for path, x in abstract(config).items()
  }
  back = import_tensors(family, config, export_tensors(family, config, params))
  for path, value in params.items():
    np.testing.assert_array_equal(back[path], value)


def flatten(config, prefix="") -> dict:
  flat = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      flat |= flatten(value, f"{prefix}{field.name}.")
    else:
      flat[prefix + field.name] = value
  return flat


def test_options_of_llada_moe():
  config = model_of(
    config_json("lladamoe_tiny"),
    moe_router_enable_expert_bias=True,
    shared_expert_intermediate_size=16,
    moe_layer_freq=[0, 1],
  )
  shapes = tensor_shapes(config)
  assert shapes["model.layers.1.mlp.expert_bias"] == (8,)
  assert shapes["model.layers.1.mlp.shared_expert.down_proj.weight"] == (32, 16)
  assert shapes["model.layers.0.mlp.down_proj.weight"] == (32, 96)
  assert not any(name.startswith("model.layers.0.mlp.experts") for name in shapes)


@st.composite
def models(draw):
  """Any small model, most of which no family has."""
  heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (2, 1)]))
  routed = draw(st.booleans())
  router = draw(
    st.sampled_from(
      [
        TopKSoftmax(),
        TopKSoftmax(expert_bias=True),
        TopKSoftmax(norm_topk_prob=True),
        TopKSoftmax(routed_scaling_factor=2.0),
        SigmoidBias(),
        SigmoidBias(n_group=4, topk_group=2, routed_scaling_factor=2.5),
        SigmoidBias(norm_topk_prob=False),
      ]
    )
  )
  moe = MoEConfig(
    num_experts=8,
    num_experts_per_tok=draw(st.sampled_from([1, 2])),
    expert_intermediate_size=8,
    shared_expert_intermediate_size=draw(st.sampled_from([None, 8, 12, 16])),
    router=router,
  )
  causal = draw(st.booleans())
  return ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=draw(st.sampled_from([None, 16 // heads, 8])),
    intermediate_size=24,
    moe=moe if routed else None,
    first_k_dense=draw(st.integers(0, 1)) if routed else 0,
    partial_rotary_factor=draw(st.sampled_from([1.0, 0.5])),
    rope_theta=draw(st.sampled_from([1e4, 5e5])),
    qk_norm=draw(st.booleans()),
    attention_bias=draw(st.booleans()),
    causal=causal,
    shift=draw(st.booleans()),
    tie_word_embeddings=draw(st.booleans()),
    mask_token_id=draw(st.sampled_from([None, 3] if causal else [3])),
    eos_token_id=1,
    pad_token_id=2,
  )


def test_a_model_has_a_family_or_a_reason():
  seen = set()

  @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
  @hypothesis.given(models())
  def law(config):
    try:
      family = family_for(config)
    except ValueError as error:
      seen.add(None)
      assert all(f"{family.name} has no " in str(error) for family in FAMILIES)
      return
    seen.add(family.name)
    said = family.hf_config(config)
    assert family_of(said) is family
    back = family.model_config(said, ids=ids_of(config), dtype="float32")
    assert architecture(back) == architecture(config)
    shapes = {path: x.shape for path, x in abstract(back).items()}
    assert shapes == {path: x.shape for path, x in abstract(config).items()}

  law()
  assert {None, "llada_moe"} <= seen


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"shift": True}, "llada_moe has no shift=True"),
    ({"partial_rotary_factor": 0.5}, "llada_moe has no partial_rotary_factor=0.5"),
    ({"attention_bias": True}, "llada_moe has no attention_bias=True"),
    ({"head_dim": 32}, "llada_moe has no head_dim=32"),
  ],
)
def test_the_reason_names_the_field(changes, message):
  with pytest.raises(ValueError, match=message):
    family_for(tiny(**changes))


def test_the_reason_names_the_router():
  moe = dataclasses.replace(tiny().moe, router=TopKSoftmax(norm_topk_prob=True))
  with pytest.raises(ValueError, match=r"llada_moe has no moe.router=TopKSoftmax\(norm_topk_prob"):
    family_for(tiny(moe=moe))


def test_a_home_does_not_depend_on_how_it_is_computed():
  moe = dataclasses.replace(tiny().moe, exchange=Ring(), implementation="reference")
  config = tiny(moe=moe, remat="full", scan_unroll=2, dtype="bfloat16", param_dtype="bfloat16")
  assert family_for(config) is BY_NAME["llada_moe"]
