"""Edits by hand. The laws of all edits: tests/contracts; dInfer's and LLaDA2.1's: test_dinfer_rules."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy_denoise as toy

from lladax.infer import EditTokens, Entropy, LowEosConfidence, RemaskLow, SamplerConfig, generate

MASK = 9


def apply(edit, *, tokens, drawn, confidence, commit, given=()):
  tokens = np.array([tokens])
  masked = tokens == MASK
  editable = ~masked
  editable[0, list(given)] = False
  return [
    np.flatnonzero(np.asarray(x)[0]).tolist()
    for x in edit(
      tokens=jnp.asarray(tokens),
      drawn=jnp.array([drawn]),
      confidence=jnp.array([confidence]),
      probability=jnp.zeros((1, tokens.shape[1])),
      masked=jnp.asarray(masked),
      commit=jnp.asarray([[place in commit for place in range(tokens.shape[1])]]),
      editable=jnp.asarray(editable),
    )
  ]


@pytest.mark.quick
def test_a_sure_change_of_mind_replaces_what_was_written_but_never_what_was_given():
  commit, replace, remask = apply(
    EditTokens(0.9),
    tokens=[1, 2, 3, 4, MASK],
    drawn=[5, 5, 3, 5, 5],
    confidence=[0.95, 0.99, 0.99, 0.9, 0.99],
    commit=[4],
    given=[1],
  )
  # 1 is given, 2 stays as it is, 3 is not above the threshold, 4 is a mask.
  assert (commit, replace, remask) == ([4], [0], [])


def test_doubts_are_masked_again_and_one_more_is_written():
  commit, replace, remask = apply(
    RemaskLow(0.4),
    tokens=[1, 2, MASK, MASK, MASK, MASK],
    drawn=[1, 7, 5, 5, 5, 5],
    confidence=[0.9, 0.1, 0.3, 0.6, 0.2, 0.95],
    commit=[5],
  )
  # One doubt, so two are written: the rule's own and the most confident of the rest.
  assert (commit, replace, remask) == ([3, 5], [], [1])


def test_a_doubt_that_is_surer_than_any_mask_gets_the_token_drawn():
  commit, replace, remask = apply(
    RemaskLow(0.4),
    tokens=[1, MASK, MASK],
    drawn=[7, 5, 5],
    confidence=[0.35, 0.2, 0.3],
    commit=[2],
  )
  assert (commit, replace, remask) == ([2], [0], [])


def test_enough_accepted_tokens_force_no_others():
  commit, replace, remask = apply(
    RemaskLow(0.4),
    tokens=[1, MASK, MASK, MASK],
    drawn=[7, 5, 5, 5],
    confidence=[0.1, 0.95, 0.95, 0.2],
    commit=[1, 2],
  )
  assert (commit, replace, remask) == ([1, 2], [], [0])


def test_what_was_given_is_never_in_doubt_and_a_written_block_stays():
  args = {"drawn": [7, 5], "confidence": [0.1, 0.5]}
  assert apply(RemaskLow(), tokens=[1, MASK], commit=[1], given=[0], **args) == [[1], [], []]
  assert apply(RemaskLow(), tokens=[1, 2], commit=[], **args) == [[], [], []]


@pytest.mark.parametrize("edit", [None, EditTokens(0.3, extra_steps=3), RemaskLow(0.3)])
def test_the_loop_records_probabilities_and_edits_go_by_them_whatever_the_rule_ranks_by(edit):
  """Entropies are at most 0 and a discouraged end has less still: neither is a probability."""
  config = SamplerConfig(
    gen_length=12, steps=12, block_length=12, unmask=Entropy(), eos=LowEosConfidence(), edit=edit
  )
  prompts, ids = [[1, 2, 3], [4]], {"mask_id": toy.MASK, "eos_id": toy.EOS, "pad_id": toy.PAD}
  result = generate(toy.toy_denoise, toy.PARAMS, prompts, config, **ids)
  written = result.revealed_at >= 0
  assert written.sum() == 24 and not (result.tokens == toy.MASK).any()
  assert (result.confidence[written] > 0).all() and (result.confidence <= 1).all()
  for row, prompt in enumerate(prompts):
    assert result.row(row)[: len(prompt)] == prompt
  if isinstance(edit, EditTokens):  # with scores instead of probabilities nothing would pass
    assert (result.revealed_at >= result.nfe[:, None] - 3).any() and (result.nfe > 12).all()


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: EditTokens(1.5), "threshold of EditTokens lies between 0 and 1; got 1.5"),
    (lambda: EditTokens(extra_steps=-1), "extra_steps is at least 0; got -1"),
    (lambda: RemaskLow(-0.1), "threshold of RemaskLow lies between 0 and 1; got -0.1"),
  ],
)
def test_numbers_that_do_not_fit_are_errors(make, message):
  with pytest.raises(ValueError, match=message):
    make()
