"""Laws of fine-tuning data: prompts are never noised, answers are whole, batches are functions of
(seed, step)."""

import dataclasses
import itertools
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from lladax import config as config_lib
from lladax.data import Bytes
from lladax.data.conversations import ConversationError
from lladax.hub import BUILT_IN, Chat, chat_tokenizer
from lladax.tune import ConversationConfig, best_fit

SHORT = [(f"u{i}", "a" * (1 + i % 7)) for i in range(23)]
LONG = [("x", "yy", "z", "w" * 5, "v", "uuu")]


def write(path, conversations):
  """Conversations as tuples of contents, the user's first."""
  with path.open("w") as file:
    for contents in conversations:
      roles = itertools.cycle(("user", "assistant"))
      messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
      file.write(json.dumps({"messages": messages}) + "\n")
  return str(path)


def config_of(tmp_path, conversations=(*SHORT, *LONG), **fields):
  fields = {"length": 80, "batch_size": 8, "seed": 3, "template": "chatml", **fields}
  path = write(tmp_path / "c.jsonl", conversations)
  fields = {"tokenizer": "bytes", "heldout": 0.0, **fields}
  return ConversationConfig(conversations=path, **fields)


def batches(data, count, rows=None):
  return list(itertools.islice(data.train_iterator(rows=rows), count))


def chat_for(name="chatml"):
  tokenizer = chat_tokenizer(Bytes(), BUILT_IN[name])
  return Chat(tokenizer, tokenizer.template)


def expected_turns(conversations, chat):
  """Ids of prompt and answer by hand, of every turn of every conversation."""
  turns = {}
  for contents in conversations:
    for end in range(2, len(contents) + 1, 2):
      roles = itertools.cycle(("user", "assistant"))
      messages = [{"role": r, "content": c} for r, c in zip(roles, contents[:end], strict=False)]
      prompt = chat.encode(messages[:-1])
      answer = [*chat.tokenizer.encode(messages[-1]["content"]), chat.end_of_turn_id]
      turns[tuple(prompt + answer)] = len(prompt), len(answer)
  return turns


def pieces(batch):
  """(row, segment, ids, maskable, positions) of every segment of a batch."""
  for row in range(len(batch.tokens)):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      own = batch.segment_ids[row] == segment
      yield (
        row,
        segment,
        batch.tokens[row][own],
        batch.maskable[row][own],
        batch.positions[row][own],
      )


def assert_is_a_turn(ids, maskable, positions, turns, eos):
  """The tokens are a turn and end of text after it; all from the answer on is maskable."""
  known = [n for n in range(1, len(ids) + 1) if tuple(ids[:n].tolist()) in turns]
  assert known, "no turn of the conversations"
  prompt, answer = turns[tuple(ids[: known[-1]].tolist())]
  assert ids[prompt + answer :].tolist() == [eos] * (len(ids) - prompt - answer)
  assert maskable.tolist() == [False] * prompt + [True] * (len(ids) - prompt)
  assert positions.tolist() == list(range(len(ids)))
  return prompt, answer


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_padding", ["batch", "length", "none"])
@pytest.mark.parametrize("eos_tail", [0, 3])
def test_rows_are_turns_and_end_of_text(tmp_path, eos_padding, eos_tail):
  config = config_of(tmp_path, eos_padding=eos_padding, eos_tail=eos_tail)
  data, chat = config.load(), chat_for()
  turns = expected_turns((*SHORT, *LONG), chat)
  tails = set()
  for batch in batches(data, 9):
    ends = (batch.segment_ids > 0).sum(axis=1)
    longest = 0
    for row, segment, ids, maskable, positions in pieces(batch):
      prompt, answer = assert_is_a_turn(ids, maskable, positions, turns, Bytes().eos_id)
      assert segment == 1
      longest = max(longest, prompt + answer)
      tails.add(int(ends[row]) - prompt - answer)
    assert (batch.tokens[batch.segment_ids == 0] == Bytes().pad_id).all()
    assert not batch.maskable[batch.segment_ids == 0].any()
    if eos_padding == "batch":
      assert longest <= ends[0] <= longest + eos_tail and (ends == ends[0]).all()
    elif eos_padding == "length":
      assert (ends == 80).all()
  if eos_padding == "none":
    assert tails == set(range(eos_tail + 1))


def test_an_epoch_has_every_conversation_once_by_one_of_its_turns(tmp_path):
  conversations = (*SHORT, *LONG)  # 24, three batches
  data = config_of(tmp_path, eos_padding="none").load()
  turns = list(expected_turns(conversations, chat_for()))
  of_long = turns[-3:]
  drawn, iterator = [], data.train_iterator()
  for _ in range(40):
    epoch = itertools.islice(iterator, 3)
    found = [tuple(ids.tolist()) for batch in epoch for _, _, ids, _, _ in pieces(batch)]
    assert len(found) == 24 and set(found) >= set(turns[:-3])
    (long,) = set(found) - set(turns[:-3])
    drawn.append(of_long.index(long))
  counts = np.bincount(drawn, minlength=3)
  assert counts.min() >= 5  # of an expected 13


def test_the_end_of_a_row_depends_on_the_batch_and_not_on_who_asks(tmp_path):
  data = config_of(tmp_path, eos_padding="batch").load()
  whole = batches(data, 6)
  for rows in ([0, 1], [2], [3, 5, 7], [0, 4]):
    expected = [jax.tree.map(lambda array: array[rows], batch) for batch in whole]  # noqa: B023
    jax.tree.map(np.testing.assert_array_equal, batches(data, 6, np.array(rows)), expected)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_resumes_anywhere_and_a_stage_goes_on(tmp_path, packing):
  fields = {"packing": True, "eos_padding": "none", "eos_tail": 4} if packing else {}
  data = config_of(tmp_path, batch_size=4, **fields).load()
  expected = batches(data, 12)
  for step in (0, 1, 5, 11):
    iterator = data.train_iterator()
    iterator.set_state({"next_index": step, "start": {}})
    jax.tree.map(np.testing.assert_array_equal, next(iterator), expected[step])
  state = iterator.get_state()
  stage = data.train_iterator()
  stage.continue_after(state)
  assert stage.epochs(0) == data.epochs(12)
  if not packing:
    after = data.train_iterator()
    after.set_state({"next_index": 12, "start": {}})
    jax.tree.map(np.testing.assert_array_equal, next(stage), next(after))


def test_other_seeds_give_other_batches(tmp_path):
  one, two = (batches(config_of(tmp_path, seed=seed).load(), 3) for seed in (0, 1))
  assert any((a.tokens != b.tokens).any() for a, b in zip(one, two, strict=True))


# --- held out, length, errors --------------------------------------------------------------------


def test_held_out_answers_come_once_each_and_to_their_end(tmp_path):
  config = config_of(tmp_path, heldout=0.4)
  data, chat = config.load(), chat_for()
  turns = expected_turns((*SHORT, *LONG), chat)
  assert len(data.train) + len(data.heldout) == len(turns)
  assert 3 <= data.heldout.num_conversations <= 17
  found = []
  for batch in data.heldout_iterator(batch_size=4):
    for _, _, ids, maskable, positions in pieces(batch):
      prompt, answer = assert_is_a_turn(ids, maskable, positions, turns, Bytes().eos_id)
      assert len(ids) == prompt + answer
      found.append(tuple(ids.tolist()))
  trained = {tuple(data.train.ids(i).tolist()) for i in range(len(data.train))}
  assert len(found) == len(set(found)) and trained.isdisjoint(found)
  assert trained | set(found) == set(turns)
  other = dataclasses.replace(config, split_seed=1).load()
  assert other.fingerprint() != data.fingerprint()


def test_held_out_files(tmp_path):
  heldout = write(tmp_path / "h.jsonl", [("q", "r", "s", "t")])
  data = config_of(tmp_path, heldout_conversations=heldout).load()
  assert (data.num_heldout, data.train.num_conversations) == (2, 24)


def test_a_long_turn_is_an_error_or_dropped_but_never_cut(tmp_path):
  conversations = [("u", "a"), ("u", "b" * 80), ("u", "c", "u", "d" * 80)]
  with pytest.raises(ConversationError, match=r"c.jsonl:2: .* have 1\d\d tokens, and a row has 80"):
    config_of(tmp_path, conversations).load()
  data = config_of(tmp_path, conversations, too_long="drop").load()
  assert (data.dropped, len(data.train), data.train.num_conversations) == (2, 2, 2)
  with pytest.raises(ValueError, match="no conversation to train on .* 1 turns were longer"):
    config_of(tmp_path, conversations[1:2], too_long="drop").load()
  exact = len(data.train.ids(0))
  assert config_of(tmp_path, conversations[:1], length=exact).load().dropped == 0
  with pytest.raises(ConversationError, match="and up to 1 of end of text"):
    config_of(tmp_path, conversations[:1], length=exact, eos_tail=1).load()


def test_errors_come_before_anything_is_encoded(tmp_path):
  with pytest.raises(ValueError, match="no tokenizer: start from a run"):
    config_of(tmp_path, tokenizer=None).load()
  with pytest.raises(ValueError, match="template 'alpaca': neither one of llada_moe"):
    config_of(tmp_path, template="alpaca").load()
  with pytest.raises(ValueError, match="has no chat template"):
    config_of(tmp_path, template=str(tmp_path)).load()
  with pytest.raises(ValueError, match="needs 2 more tokens .* the model has 259 ids"):
    config_of(tmp_path).load(vocab_size=259)
  with pytest.raises(ConversationError, match=r"c.jsonl:1: .* no place for the role tool"):
    path = tmp_path / "c.jsonl"
    messages = [{"role": r, "content": "x"} for r in ("user", "tool", "assistant")]
    path.write_text(json.dumps({"messages": messages}))
    ConversationConfig(conversations=str(path), tokenizer="bytes", template="chatml").load()


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"eos_padding": "row"}, "eos_padding is one of batch, length, none; got 'row'"),
    ({"too_long": "cut"}, "too_long is one of error, drop; got 'cut'"),
    ({"eos_tail": -1}, "eos_tail is not negative"),
    ({"heldout": 1.0}, "heldout is a fraction"),
    ({"packing": True}, "packing leaves no row to pad with eos_padding='batch'"),
    ({"length": 0}, "length is at least 1"),
  ],
)
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    ConversationConfig(conversations="x", **fields)


def test_the_config_goes_through_text():
  config = ConversationConfig(conversations=("a", "b"), packing=True, eos_padding="none")
  assert config_lib.from_json(config_lib.to_json(config)) == config
  changed = config_lib.override(config, ["eos_padding=none", "conversations=c.jsonl"])
  assert changed.conversations == "c.jsonl"
  with pytest.raises(config_lib.ConfigError, match="eos_padding"):
    config_lib.override(config, ["eos_padding=some"])


def test_the_tokenizer_of_a_run_is_extended(tmp_path):
  data = config_of(tmp_path, tokenizer=None).load(tokenizer=Bytes(), vocab_size=260)
  assert data.tokenizer.vocab_size == 260
  assert data.tokenizer.encode("a<|im_end|>") == Bytes().encode("a<|im_end|>")


def test_a_template_that_shortens_earlier_answers(tmp_path):
  """As those that take out what was thought: then an earlier turn is not the beginning of a later."""
  source = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>"
    "{% elif loop.last %}{{ m.content }}<|im_end|>{% else %}cut<|im_end|>{% endif %}{% endfor %}"
  )
  (tmp_path / "template").mkdir()
  (tmp_path / "template" / "chat_template.jinja").write_text(source)
  tokenizer = chat_tokenizer(Bytes(), BUILT_IN["chatml"])
  config = config_of(tmp_path, LONG, template=str(tmp_path / "template"))
  data = config.load(tokenizer=tokenizer)
  texts = [tokenizer.decode(data.train.ids(i), skip_special=False) for i in range(3)]
  assert [text.replace("<|im_end|>", ".") for text in texts] == [
    "x.yy.", "x.cut.z.wwwww.", "x.cut.z.cut.v.uuu."
  ]  # fmt: skip
  assert data.train.prompt.tolist() == [2, 8, 14]


# --- packing -------------------------------------------------------------------------------------


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_puts_every_item_into_a_row_once(lengths):
  rows = best_fit(np.array(lengths, np.int64), 20)
  assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
  used = [sum(lengths[item] for item in row) for row in rows]
  assert all(total <= 20 for total in used)
  # What first fit decreasing needs too at most: 11 / 9 of the optimum and one (Johnson, 1973).
  assert len(rows) <= 11 / 9 * -(-sum(lengths) // 20) + 1 or sorted(used)[:1] > [20 / 3]


def test_best_fit_is_what_its_definition_says():
  random = np.random.default_rng(0)
  lengths = random.integers(1, 50, size=300)
  rows, left = [], []
  for item in np.argsort(-lengths, kind="stable"):
    room = [n for n in left if n >= lengths[item]]
    row = left.index(min(room)) if room else len(left)
    if not room:
      left.append(50)
      rows.append([])
    left[row] -= lengths[item]
    rows[row].append(item)
  found = best_fit(lengths, 50)
  assert len(found) == len(rows)
  assert sorted(50 - lengths[row].sum() for row in found) == sorted(left)


def test_packed_rows_hold_every_conversation_once_an_epoch(tmp_path):
  config = config_of(
    tmp_path, packing=True, eos_padding="none", eos_tail=4, batch_size=1, length=100
  )
  data, chat = config.load(), chat_for()
  conversations = (*SHORT, *LONG)
  turns = expected_turns(conversations, chat)
  of_long = list(turns)[-3:]
  iterator, tails, lengths = data.train_iterator(), set(), []
  for epoch in range(6):
    assert iterator.epochs() == {pathlib.Path(config.conversations).name: pytest.approx(epoch)}
    found, count = [], len(data._packing.epoch(epoch))
    for batch in itertools.islice(iterator, count):
      for _, _, ids, maskable, positions in pieces(batch):
        prompt, answer = assert_is_a_turn(ids, maskable, positions, turns, Bytes().eos_id)
        tails.add(len(ids) - prompt - answer)
        found.append(tuple(ids[: prompt + answer].tolist()))
    lengths.append(count)
    assert len(found) == 24
    assert sum(turn in of_long for turn in found) == 1
    assert set(found) >= set(list(turns)[:-3])
  assert tails == {0, 1, 2, 3, 4}
  assert max(lengths) <= 10  # 24 rows where nothing is packed


def test_packing_is_a_function_of_the_seed_and_the_epoch(tmp_path):
  fields = {"packing": True, "eos_padding": "none", "eos_tail": 2, "length": 100}
  config = config_of(tmp_path, **fields)
  one, two = (batches(config.load(), 5) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  other = batches(dataclasses.replace(config, seed=9).load(), 5)
  assert any((a.tokens != b.tokens).any() for a, b in zip(one, other, strict=True))


def test_prefetching_threads_change_nothing(tmp_path):
  fields = {"packing": True, "eos_padding": "none", "length": 100, "batch_size": 3}
  config = config_of(tmp_path, **fields)
  slow, fast = (
    batches(dataclasses.replace(config, prefetch=prefetch).load(), 30) for prefetch in (0, 8)
  )
  jax.tree.map(np.testing.assert_array_equal, slow, fast)
