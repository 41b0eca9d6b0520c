"""What of a config.json, and of a folder that contradicts it, is refused, and in which words."""

import hypothesis
import hypothesis.strategies as st
import pytest
from folders import FAMILY_OF_GOLDEN, NAMES, config_json, model_of, read

from lladax.hub.families import family_of
from lladax.models import ModelConfig


def test_newer_files_keep_theta_elsewhere():
  config = dict(config_json("qwen2_ar"))
  theta = config.pop("rope_theta")
  inner = {"rope_type": "default", "rope_theta": theta}
  assert model_of(config, rope_parameters=inner) == read("qwen2_ar")[1]
  with pytest.raises(ValueError, match="rope_theta is missing"):
    model_of(config)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "mamba"}, "model_type 'mamba', which contradict each other"),
    ({"architectures": ["MambaForCausalLM"]}, "no architecture that lladax knows.*llada2"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling is .*yarn"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1; lladax computes 0 there"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; a number is expected"),
    ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ({"vocab_size": True, "embedding_size": None}, "vocab_size is True; a whole number"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types is .*whole sequence"),
    ({"use_sliding_window": True}, "use_sliding_window is True; .*whole sequence"),
  ],
)
def test_every_family_refuses(name, changes, message):
  with pytest.raises(ValueError, match=message):
    model_of(config_json(name), **changes)


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("lladamoe_tiny", {"clip_qkv": 8.0}, "clip_qkv is 8.0; lladax computes nothing but null"),
    ("lladamoe_tiny", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; whole heads"),
    ("qwen2_ar", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "factor is 0.5; whole heads"),
    ("dream", {"rope_parameters": "yarn"}, "rope_parameters is 'yarn'; an object is expected"),
    ("dream", {"architectures": "DreamModel"}, "architectures is 'DreamModel'; a list is expected"),
    ("dream", {"rope_theta": -1}, "rope_theta is -1.0; a positive number"),
    ("lladamoe_tiny", {"moe_layer_freq": [1, 0]}, r"moe_layer_freq is \[1, 0\]; 2 flags"),
    ("lladamoe_tiny", {"moe_layer_freq": [1]}, "moe_layer_freq"),
    ("lladamoe_tiny", {"router_num_group": 4}, "router_num_group is 4"),
    ("lladamoe_tiny", {"moe_router_score_function": "sigmoid"}, "score_function is 'sigmoid'"),
    ("llada_dense", {"alibi": True}, "alibi is True"),
    ("llada_dense", {"block_type": "sequential"}, "block_type is 'sequential'; .*'llama'"),
    ("llada_dense", {"rope": None}, "rope is None; lladax computes True"),
    ("llada_dense", {"weight_tying": None}, "weight_tying is missing; a true or false"),
    ("llada_dense", {"d_model": None, "num_experts": 8}, "d_model is missing"),
    ("llada2_moe", {"score_function": "softmax"}, "score_function is 'softmax'"),
    ("llada2_moe", {"rotary_dim": 8}, "rotary_dim is 8, but partial_rotary_factor=0.5"),
    ("llada2_moe", {"n_group": 4, "topk_group": 5}, "topk_group"),
    ("dream", {"attention_bias": False}, "attention_bias is False"),
    ("qwen2_ar", {"use_mrope": True}, "use_mrope is True"),
    ("qwen2_ar", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
  ],
)
def test_refused(name, changes, message):
  with pytest.raises(ValueError, match=message):
    model_of(config_json(name), **changes)


def test_a_name_without_its_key_is_refused():
  config = {key: x for key, x in config_json("llada_dense").items() if key != "d_model"}
  with pytest.raises(ValueError, match="but no d_model, which every llada model has"):
    family_of(config)


def test_model_type_alone_is_told_apart_by_keys():
  for name in NAMES:
    config = {key: x for key, x in config_json(name).items() if key != "architectures"}
    assert family_of(config).name == FAMILY_OF_GOLDEN[name]
  with pytest.raises(ValueError, match="model_type 'llada', which is no architecture"):
    family_of({"model_type": "llada"})


@pytest.mark.parametrize(
  ("name", "tensor", "message"),
  [
    ("lladamoe_tiny", "model.layers.0.mlp.expert_bias", "has an expert bias"),
    ("lladamoe_tiny", "model.layers.0.mlp.shared_expert.gate_proj.weight", "has a shared expert"),
    ("llada_dense", "model.transformer.blocks.0.q_proj.bias", "has biases of the attention"),
    ("llada2_moe", "model.layers.0.attention.query_key_value.bias", "has biases of the attention"),
  ],
)
def test_tensors_that_the_config_denies(name, tensor, message):
  family, config, tensors, _, _ = read(name)
  with pytest.raises(ValueError, match=f"{message} \\({tensor}\\).*config.json"):
    family.rows(config, {*tensors, tensor})


JSON = st.recursive(
  st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
  ),
  max_leaves=4,
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(name=st.sampled_from(NAMES), data=st.data())
def test_any_json_makes_a_model_or_a_clear_error(name, data):
  config = config_json(name)
  keys = [
    *sorted(config),
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "rotary_dim",
    "head_dim",
  ]
  changes = data.draw(st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=2))
  try:
    assert isinstance(model_of(config, **changes), ModelConfig)
  except ValueError as error:
    assert len(str(error)) > 20
