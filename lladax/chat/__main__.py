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

import lladax
from lladax.chat import Session, talk
from lladax.config import ConfigError, fields_help, override
from lladax.infer import SamplerConfig
from lladax.sharding import MeshConfig

FLAGS = flags.FLAGS


flags.DEFINE_string(
  "model",
  None,
  "Workdir of a run or one of its checkpoints, a Hugging Face folder or id, or a folder that "
  "`python -m lladax.hub import` wrote.",
  required=True,
)
flags.DEFINE_string("system", None, "What the assistant is told before everything else.")
flags.DEFINE_string("load", None, "A conversation that /save wrote.")
flags.DEFINE_string("record", None, "Name of a replay: NAME.html and NAME.gif are written.")
flags.DEFINE_integer("seed", 0, "Seed of the first answer; the others count on from it.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. Default: as saved.")
flags.DEFINE_enum(
  "weights", None, ["int8", "fp8"], "Experts' weights in eight bits. Default: as --dtype."
)
flags.DEFINE_multi_string(
  "mesh", [], "Devices that share the model, as axis=size.\n" + fields_help(MeshConfig())
)
flags.DEFINE_multi_string(
  "set", [], "Field of the sampler as name=value. Fields:\n" + fields_help(SamplerConfig())
)


def main(_):
  logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every file it reads
  try:
    mesh = override(MeshConfig(), FLAGS.mesh) if FLAGS.mesh else None
    model = lladax.load(FLAGS.model, mesh=mesh, dtype=FLAGS.dtype)
    if model.tokenizer is None:
      raise ValueError("this model has no tokenizer: there is no text to talk in")
    sampler = override(model.sampler, FLAGS.set)
    model = model.for_inference(weights=FLAGS.weights)
    session = Session(model, sampler=sampler, seed=FLAGS.seed, record=FLAGS.record)
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
