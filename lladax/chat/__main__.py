"""Chat with a model in the terminal and see its answers crystallise.

python -m lladax.chat --model=inclusionAI/LLaDA-MoE-7B-A1B-Instruct --dtype=bfloat16
python -m lladax.chat --model=runs/tiny_text --set temperature=0.7 --record=answer

Tokens are coloured by the confidence with which they were written, from red to green. A model
without a chat template continues the text instead. /help lists the commands; Ctrl-C stops an
answer. With --record=NAME the conversation is kept as NAME.html, which plays every answer without
a network, and NAME.gif.
"""

from __future__ import annotations

import sys

from absl import app, flags, logging

from lladax.chat import Session, talk
from lladax.config import ConfigError
from lladax.model_flags import define_flags, open_model

FLAGS = flags.FLAGS

define_flags()

flags.DEFINE_string("system", None, "What the assistant is told before everything else.")
flags.DEFINE_string("load", None, "A conversation that /save wrote.")
flags.DEFINE_string("record", None, "Name of a replay: NAME.html and NAME.gif are written.")
flags.DEFINE_integer("seed", 0, "Seed of the first answer; the others count on from it.")


def main(_):
  logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every file it reads
  try:
    model = open_model()
    if model.tokenizer is None:
      raise ValueError("this model has no tokenizer: there is no text to talk in")
    model = model.for_inference(weights=FLAGS.weights)
    session = Session(model, sampler=model.sampler, seed=FLAGS.seed, record=FLAGS.record)
    if FLAGS.system:
      session.command("system", FLAGS.system)
    if FLAGS.load:
      session.command("load", FLAGS.load)
  except (ConfigError, ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  prompt = ""
  if session.console.is_terminal:
    prompt = "> "
    session.console.print(
      "/help lists the commands" if session.conversation.chats else
      "this model has no chat template: it continues the text; /help lists the commands",
      style="dim",
    )  # fmt: skip
  talk(session, lambda: input(prompt))


if __name__ == "__main__":
  app.run(main)
