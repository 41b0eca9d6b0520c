"""Problems of reasoning-gym: the sides do not overlap, files depend on the arguments only."""

import json

import pytest

from lladax.data import make_tokenizer
from lladax.data.conversations import check_conversations, read_conversations

pytest.importorskip("reasoning_gym", reason="pip install 'lladax[reasoning]'")
from experiments import reasoning_data

ARGUMENTS = {"tasks": ["gsm_easy", "sums"], "train": 400, "heldout": 60, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  target = tmp_path_factory.mktemp("reasoning")
  reasoning_data.write(target, vocab_size=400, **ARGUMENTS)
  return target


def conversations(folder, side):
  return list(read_conversations(str(folder / f"{side}.jsonl")))


def test_held_out_questions_are_nowhere_else(folder):
  train, held = (
    [entry.messages[0].content for entry in conversations(folder, side)]
    for side in ("train", "heldout")
  )
  assert len(train) == 400 and len(held) == len(set(held)) == 60
  assert set(train).isdisjoint(held)
  text = (folder / "text.jsonl").read_text()
  assert len(text.splitlines()) == 400
  assert not any(json.dumps(question)[1:-1] in text for question in held)
  paths = [str(folder / name) for name in ("train.jsonl", "heldout.jsonl")]
  assert check_conversations(paths)["answers"] == 460


def test_files_depend_on_the_arguments_only(folder, tmp_path):
  reasoning_data.write(tmp_path, vocab_size=400, **ARGUMENTS)
  for path in folder.rglob("*.json*"):
    assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_worked_answers_are_right_and_others_wrong(folder):
  held = conversations(folder, "heldout")
  worked = [entry.messages[1].content for entry in held]
  assert reasoning_data.score(held, worked) == {"gsm_easy": 1.0, "sums": 1.0, "all": 1.0}
  assert reasoning_data.score(held, ["no idea"] * len(held))["all"] == 0
  shifted = reasoning_data.score(held, worked[2:] + worked[:2])
  assert shifted["all"] < 0.2


def test_numbers_are_read_digit_by_digit(folder):
  tokenizer = make_tokenizer(str(folder / "tokenizer"))
  text = "He has 1234 pears and 56.7 more\n#### 8"
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  pieces = [tokenizer.decode([i]) for i in ids]
  assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))


def test_an_unknown_task(tmp_path):
  with pytest.raises(ValueError, match="unknown task 'gsm'; one of gsm_symbolic"):
    reasoning_data.write(tmp_path, vocab_size=300, **{**ARGUMENTS, "tasks": ["gsm"]})
