"""Write text with a model: continue prompts, answer a message, or fill the masks in a text.

python -m lladax.generate --model=runs/tiny_text --prompt="ROMEO."
python -m lladax.generate --model=runs/tiny_text --infill="To be, or<|mask|><|mask|> to be"
python -m lladax.generate --model=inclusionAI/LLaDA-MoE-7B-A1B-Instruct --mesh=expert=8 --chat="Hi"
python -m lladax.generate --model=runs/tiny_text --prompts=asked.jsonl --output=answers.jsonl
echo "ROMEO." | python -m lladax.generate --model=runs/tiny_text

A file of prompts is JSONL, each line {"prompt": text}, {"messages": [...]} or {"infill": text}, or
text with a prompt on each line; "-" is standard input. The answers to one go to --output, in its
order; the same command again goes on where it was stopped. An answer depends on its own line and
number alone, not on --batch.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys

from absl import app, flags, logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lladax.config import ConfigError
from lladax.data import encode_with_masks
from lladax.infer import SamplerConfig, view
from lladax.model import MASK_TEXT, Model, cut_before
from lladax.model_flags import define_flags, open_model
from lladax.prompts import Answers, Prompt, read_prompts

FLAGS = flags.FLAGS

define_flags()
flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
flags.DEFINE_multi_string(
  "chat", [], "A message to answer, put into the model's chat template; may be given several times."
)
flags.DEFINE_string("infill", None, "Text in which each <|mask|> is replaced by one token.")
flags.DEFINE_string("prompts", None, "File of prompts, .jsonl or text; - for standard input.")
flags.DEFINE_string("output", None, "JSONL of the answers to --prompts. Default: standard output.")
flags.DEFINE_integer("batch", 8, "Prompts of a file that are decoded together.", lower_bound=1)
flags.DEFINE_multi_string(
  "stop", [], "Text before which an answer ends; may be given several times."
)
flags.DEFINE_integer("seed", 0, "Seed of the first prompt; the others count on from it.")
flags.DEFINE_bool("watch", False, "Show the canvas while it is denoised.")
flags.DEFINE_bool("json", False, "Print one JSON object per text instead of the text.")


def main(_):
  sources = [FLAGS.prompt, FLAGS.chat, FLAGS.infill, FLAGS.prompts]
  if sum(map(bool, sources)) > 1 or not (any(sources) or not sys.stdin.isatty()):
    raise app.UsageError("give one of --prompt, --chat (once or more), --infill and --prompts")
  if FLAGS.output and not FLAGS.prompts:
    raise app.UsageError("--output is for the answers to --prompts")
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every file it reads
  try:
    run()
  except (ConfigError, ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    goes_on = "; the same command goes on from here" if FLAGS.output else ""
    print(f"stopped{goes_on}", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def run():
  if FLAGS.prompts:
    prompts = read_prompts(FLAGS.prompts)
  elif FLAGS.infill:
    prompts = [Prompt(infill=FLAGS.infill)]
  elif FLAGS.chat:
    prompts = [Prompt(messages=({"role": "user", "content": text},)) for text in FLAGS.chat]
  else:
    texts = FLAGS.prompt or [sys.stdin.read().removesuffix("\n")]
    prompts = [Prompt(prompt=text) for text in texts]
  model = open_model()
  sampler = model.sampler
  if model.config.mask_token_id is not None:
    model = model.for_inference(weights=FLAGS.weights)
  if FLAGS.prompts:
    answer_file(model, sampler, prompts)
  else:
    answer_now(model, sampler, prompts)


def answer_now(model: Model, sampler: SamplerConfig, prompts: list[Prompt]):
  """Answers a few prompts on standard output."""
  result = decode(model, sampler, prompts, list(range(len(prompts))))
  for row, (prompt, answer) in enumerate(zip(prompts, result.answers, strict=True)):
    text = cut_before(model.decode(answer), FLAGS.stop)
    if FLAGS.watch:
      view.show(result, model.decode, row=row, title=prompt.text)
    if FLAGS.json:
      print(json.dumps({"prompt": prompt.text, "text": text, "nfe": int(result.nfe[row])}))
    elif not FLAGS.watch:
      print(prompt.text + text if prompt.prompt is not None else text)


def answer_file(model: Model, sampler: SamplerConfig, prompts: list[Prompt]):
  """Answers a file of prompts, in batches; those that are answered already are passed over.

  Raises:
    ValueError: for a prompt that does not fit, before anything is decoded, or an output that is of
      other prompts or settings.
  """
  ids = [encode(model, sampler, prompt, number) for number, prompt in enumerate(prompts)]
  settings = repr((sampler, FLAGS.seed, FLAGS.model, FLAGS.dtype, FLAGS.weights, FLAGS.stop))
  with Answers(FLAGS.output, prompts, settings=settings) as answers, progress() as bar:
    task = bar.add_task(
      "answers", total=len(prompts), completed=len(prompts) - len(answers.missing)
    )
    # A gap is filled by another function than a prompt is continued.
    for infill in (False, True):
      rows = [
        number for number in answers.missing if (prompts[number].infill is not None) == infill
      ]
      for start in range(0, len(rows), FLAGS.batch):
        batch = rows[start : start + FLAGS.batch]
        # The last one is filled up with one that is there, so that it has the others' shape.
        full = batch + batch[-1:] * (FLAGS.batch - len(batch))
        result = decode(
          model, sampler, [prompts[n] for n in full], full, ids=[ids[n] for n in full]
        )
        for row, number in enumerate(batch):
          answers.add(
            number,
            text=cut_before(model.decode(result.answers[row]), FLAGS.stop),
            tokens=len(result.answers[row]),
            nfe=int(result.nfe[row]),
          )
        bar.advance(task, len(batch))


def encode(model: Model, sampler: SamplerConfig, prompt: Prompt, number: int) -> list[int]:
  """Ids of a prompt of a file.

  Raises:
    ValueError: with the number of its line, for one that cannot be answered.
  """
  try:
    if prompt.messages:
      ids = model.chat_prompt(prompt.messages)
    elif prompt.infill is not None:
      ids = encode_with_masks(model.tokenizer, prompt.infill, MASK_TEXT)
      if model.config.mask_token_id not in ids:
        raise ValueError(f"nothing to fill: there is no {MASK_TEXT}")
    else:
      if MASK_TEXT in prompt.prompt:
        raise ValueError(f"it contains {MASK_TEXT}; use infill for that")
      ids = model.tokenizer.encode(prompt.prompt)
  except ValueError as error:
    raise ValueError(f"prompt {number}: {error}") from None
  new = 0 if prompt.infill is not None else sampler.gen_length
  context = model.config.max_position_embeddings
  if len(ids) + new > context:
    raise ValueError(
      f"prompt {number} has {len(ids)} tokens, and {new} more are written: that is more than the "
      f"context of {context}"
    )
  return ids


def decode(model: Model, sampler: SamplerConfig, prompts: list[Prompt], numbers, ids=None):
  """A `GenerateResult` for prompts of one kind; the seed of prompt number n is --seed + n."""
  seeds = [FLAGS.seed + number for number in numbers]
  if prompts[0].infill is not None:
    texts = ids or [prompt.infill for prompt in prompts]
    return model.infill_tokens(texts, sampler=sampler, seed=seeds)
  rows = ids or [
    model.chat_prompt(prompt.messages) if prompt.messages else prompt.prompt for prompt in prompts
  ]
  return model.generate_tokens(rows, sampler=sampler, seed=seeds, stop=FLAGS.stop)


def progress() -> contextlib.AbstractContextManager:
  columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
  console = Console(stderr=True)
  return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


if __name__ == "__main__":
  app.run(main)
