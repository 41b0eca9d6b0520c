"""The facade: what it returns agrees with the pure functions, and bad input ends in plain words."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_model

import lladax
from lladax.data import Bytes
from lladax.infer import SamplerConfig

SAMPLER = SamplerConfig(gen_length=8, steps=4, block_length=4, temperature=1.0)


@pytest.fixture(scope="module")
def model():
  return small_model(Bytes(), context=64, sampler=SAMPLER)


def test_init_is_a_function_of_the_seed(model):
  again = lladax.init(model.config, seed=1)
  other = lladax.init(model.config, seed=2)
  same = jax.tree.map(lambda a, b: bool((a == b).all()), model.params, again.params)
  assert all(jax.tree.leaves(same))
  assert not (model.params["embed"]["embedding"] == other.params["embed"]["embedding"]).all()


def test_a_row_of_ids_is_a_batch_of_one(model):
  ids = model.tokenizer.encode("to be")
  logits = model.logits(ids)
  assert logits.shape == (5, model.config.vocab_size) and logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, model.logits([ids])[0], rtol=1e-6)


def test_a_batched_answer_is_the_answer_alone(model):
  prompts = ["a", "to be, or not", ""]
  together = model.generate_tokens(prompts, seed=5).answers
  alone = [model.generate_tokens([p], seed=5 + row).answers[0] for row, p in enumerate(prompts)]
  assert together == alone
  assert model.generate("a", seed=5) == model.tokenizer.decode(alone[0])


def test_infill_changes_the_masks_only(model):
  text = "ab<|mask|><|mask|>c<|mask|>"
  row = model.infill_tokens([text], seed=3).row(0)
  assert len(row) == 6 and model.config.mask_token_id not in row
  assert model.tokenizer.decode([row[0], row[1], row[4]]) == "abc"


def test_the_likelihood_of_one_token_is_its_log_probability(model):
  prompt = model.tokenizer.encode("to b")
  answer = model.tokenizer.encode("e")
  logits = model.logits([*prompt, model.config.mask_token_id])[-1]
  exact = jax.nn.log_softmax(logits)[answer[0]]
  assert math.isclose(model.log_likelihood("to b", "e", mc_num=1), exact, rel_tol=1e-4)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m: m.generate("or <|mask|>"), r"contains <\|mask\|>; use infill"),
    (lambda m: m.generate_tokens([[m.config.mask_token_id]]), "mask"),
    (lambda m: m.generate("x" * 60), "64"),
    (lambda m: m.generate("x" * 65), "65 tokens do not fit the context of 64"),
    (lambda m: m.infill("nothing here"), "nothing to fill"),
    (lambda m: m.log_likelihood("x", ""), "the answer is empty"),
    (lambda m: m.log_likelihood([], [m.config.mask_token_id]), "contains the mask id 257"),
    (lambda m: m.logits([258]), r"ids lie in 0\.\.257; got 258"),
    (lambda m: m.logits([0.5]), "integer ids"),
    (lambda m: lladax.Model(m.config, m.params).generate("x"), "no tokenizer"),
  ],
)
def test_bad_input_ends_in_plain_words(model, call, message):
  with pytest.raises(ValueError, match=message):
    call(model)


def test_nothing_to_load(tmp_path):
  with pytest.raises(ValueError, match="there is no folder"):
    lladax.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="no checkpoint"):
    lladax.load(tmp_path)


def test_an_unknown_name_lists_those_there_are():
  with pytest.raises(AttributeError, match="Model, init, load"):
    lladax.train_everything  # noqa: B018


def test_a_stop_text_ends_the_answer_before_it(model):
  whole = model.generate(["a", "to be"], seed=5)
  stop = [text[3:5] for text in whole]
  got = model.generate(["a", "to be"], seed=5, stop=stop)
  for text, answer in zip(whole, got, strict=True):
    expected = min((text.partition(s)[0] for s in stop), key=len)
    assert answer == expected and len(answer) <= 3
  assert model.generate("a", seed=5, stop="never written") == whole[0]
  # What comes after the block that completes it is not written.
  result = model.generate_tokens(["a"], seed=5, stop=[whole[0][:1]])
  assert result.nfe[0] == 2 and len(result.row(0)) == 1 + 4
  with pytest.raises(ValueError, match="an empty text stops every answer"):
    model.generate("a", stop=[""])


def test_for_inference_answers_the_same_and_is_not_saved(model, tmp_path):
  fast = model.for_inference()
  prompts = ["a", "to be, or not", "x"]
  assert fast.generate(prompts, seed=5) == model.generate(prompts, seed=5)
  np.testing.assert_allclose(fast.logits([1, 2, 3]), model.logits([1, 2, 3]), atol=1e-4)
  with pytest.raises(ValueError, match="made ready for inference"):
    fast.save(tmp_path / "out")
  with pytest.raises(ValueError, match="int4"):
    model.for_inference(weights="int4")
