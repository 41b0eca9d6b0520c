"""Questions with worked answers, made by reasoning-gym: text to pre-train on, conversations, a scorer.

  pip install -e '.[reasoning]'
  python -m experiments.reasoning_data --target=data/reasoning --tasks=gsm_short --train=20000

writes into `--target`

  train.jsonl, heldout.jsonl   conversations: the question, the worked answer; `metadata` says which
                               problem it is
  text.jsonl                   the training problems as plain text, for pre-training
  tokenizer/tokenizer.json     a byte-level BPE of that text that reads numbers digit by digit

No held-out question occurs in the training files. Files depend on the arguments only. `score` marks
answers with reasoning-gym's own `score_answer`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from absl import app, flags
from tokenizers import decoders, models, pre_tokenizers, trainers

from lladax.data.conversations import Conversation, read_conversations
from lladax.data.tokenizer import EOS_TOKEN, MASK_TOKEN

# A problem is drawn from seed + index: the two sides must not come near each other.
HELDOUT_SEED = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Task:
  """A generator of reasoning-gym and its options.

  Attributes:
    dataset: its name there.
    options: of `reasoning_gym.create_dataset`.
    templates: of gsm_symbolic: only problems of these; None: all.
  """

  dataset: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  templates: tuple[int, ...] | None = None


TASKS = {
  # All 85 templates of GSM8K-like problems, in several steps.
  "gsm_symbolic": Task("gsm_symbolic"),
  # Six of them in two short steps of small numbers: ages, marbles, tea, bread, peaches, almonds.
  "gsm_short": Task("gsm_symbolic", templates=(10, 20, 31, 43, 48, 58)),
  # Three of them whose numbers stay below 40: peaches, marbles, bricks.
  "gsm_easy": Task("gsm_symbolic", templates=(31, 43, 72)),
  "sums": Task("chain_sum", {"max_terms": 2, "max_digits": 2}),
  "reverse": Task("spell_backward", {"min_word_len": 3, "max_word_len": 5}),
  "letters": Task("letter_counting", {"min_words": 1, "max_words": 3}),
}


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question, its worked answer, and where to find it again."""

  question: str
  worked: str
  task: str
  seed: int
  index: int

  def conversation(self) -> dict[str, Any]:
    return {
      "messages": [
        {"role": "user", "content": self.question},
        {"role": "assistant", "content": self.worked},
      ],
      "metadata": {"task": self.task, "seed": self.seed, "index": self.index},
    }

  def text(self) -> dict[str, str]:
    return {"text": f"{self.question}\n{self.worked}"}


def problems(task: str, seed: int) -> Iterator[Problem]:
  """Problems without end, in the order of their index."""
  kind, size = TASKS[task], 10_000
  for start in range(0, sys.maxsize, size):
    dataset = _dataset(task, seed, start + size)
    for index in range(start, start + size):
      if kind.templates and dataset.task_indices[index] not in kind.templates:
        continue
      entry = dataset[index]
      worked = entry["metadata"].get("answer_cot", entry["answer"])
      yield Problem(entry["question"].strip(), str(worked).strip(), task, seed, index)


def make_problems(
  task: str, train: int, heldout: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
  """Training and held-out problems; the held-out questions are all different and nowhere else.

  Raises:
    ValueError: if a task has too few different questions.
  """
  held: dict[str, Problem] = {}
  for tried, problem in enumerate(problems(task, seed + HELDOUT_SEED)):
    if len(held) == heldout:
      break
    if tried > 100 * heldout:
      raise ValueError(f"the task {task!r} has no {heldout} different questions")
    held.setdefault(problem.question, problem)
  rest = (problem for problem in problems(task, seed) if problem.question not in held)
  return [next(rest) for _ in range(train)], list(held.values())


def score(conversations: Iterable[Conversation], answers: Sequence[str]) -> dict[str, float]:
  """The share of right answers by task, and of all ("all").

  Args:
    conversations: as `heldout.jsonl` has them.
    answers: what was answered to each; of a worked answer what follows the last "####" counts.
  """
  right: dict[str, list[bool]] = {}
  for conversation, answer in zip(conversations, answers, strict=True):
    right.setdefault(conversation.metadata["task"], []).append(is_right(conversation, answer))
  by_task = {task: sum(marks) / len(marks) for task, marks in right.items()}
  marks = [mark for marks in right.values() for mark in marks]
  return {**by_task, "all": sum(marks) / max(1, len(marks))}


def is_right(conversation: Conversation, answer: str) -> bool:
  """Whether an answer has reasoning-gym's full score for this problem."""
  task, seed, index = (conversation.metadata[name] for name in ("task", "seed", "index"))
  dataset = _dataset(task, seed, index // 10_000 * 10_000 + 10_000)
  final = answer.rsplit("####", 1)[-1].strip()
  return dataset.score_answer(final, dataset[index]) >= 1


_DATASETS: dict[tuple[str, int, int], Any] = {}


def _dataset(task: str, seed: int, size: int):
  key = task, seed, size
  if key not in _DATASETS:
    try:
      import reasoning_gym
    except ModuleNotFoundError:
      raise ModuleNotFoundError(
        "problems need reasoning-gym: pip install 'lladax[reasoning]'"
      ) from None
    kind = TASKS[task]
    _DATASETS[key] = reasoning_gym.create_dataset(
      kind.dataset, seed=seed, size=size, **kind.options
    )
  return _DATASETS[key]


def digit_bpe(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
  """A byte-level BPE that never merges a digit with anything."""
  engine = tokenizers.Tokenizer(models.BPE())
  engine.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])  # fmt: skip
  engine.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[EOS_TOKEN, MASK_TOKEN],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  engine.train_from_iterator(texts, trainer, length=len(texts))
  return engine


def write(
  target: pathlib.Path,
  *,
  tasks: Sequence[str],
  train: int,
  heldout: int,
  seed: int,
  vocab_size: int,
):
  """Writes the files that the module describes; tasks take turns in them.

  Raises:
    ValueError: for an unknown task, or one with too few different questions.
  """
  if unknown := [task for task in tasks if task not in TASKS]:
    raise ValueError(f"unknown task {unknown[0]!r}; one of {', '.join(TASKS)}")
  made = [make_problems(task, train // len(tasks), heldout // len(tasks), seed) for task in tasks]
  sides = [
    [p for group in zip(*side, strict=True) for p in group] for side in zip(*made, strict=True)
  ]
  target.mkdir(parents=True, exist_ok=True)
  for name, side in zip(("train", "heldout"), sides, strict=True):
    _write_lines(target / f"{name}.jsonl", (problem.conversation() for problem in side))
  texts = [problem.text() for problem in sides[0]]
  _write_lines(target / "text.jsonl", texts)
  (target / "tokenizer").mkdir(exist_ok=True)
  engine = digit_bpe([text["text"] for text in texts], vocab_size)
  engine.save(str(target / "tokenizer" / "tokenizer.json"))


def _write_lines(path: pathlib.Path, objects: Iterable[Mapping[str, Any]]):
  lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in objects)
  path.write_text("".join(lines), encoding="utf-8")


def main(_):
  values = flags.FLAGS
  target = pathlib.Path(values.target)
  try:
    write(
      target,
      tasks=values.tasks,
      train=values.train,
      heldout=values.heldout,
      seed=values.seed,
      vocab_size=values.vocab_size,
    )
  except (ValueError, ModuleNotFoundError) as error:
    sys.exit(f"error: {error}")
  for name in ("train", "heldout"):
    count = sum(1 for _ in read_conversations(str(target / f"{name}.jsonl")))
    print(f"{target / name}.jsonl: {count} problems")


if __name__ == "__main__":
  flags.DEFINE_string("target", None, "Folder for the files.", required=True)
  flags.DEFINE_list("tasks", ["gsm_short"], f"Of {', '.join(TASKS)}.")
  flags.DEFINE_integer("train", 20_000, "Problems to train on, of all tasks.", lower_bound=1)
  flags.DEFINE_integer("heldout", 200, "Problems held out, of all tasks.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Of the problems.", lower_bound=0)
  flags.DEFINE_integer("vocab_size", 1024, "Of the tokenizer.", lower_bound=258)
  app.run(main)
