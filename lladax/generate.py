"""Write text with a model: continue prompts, answer a message, or fill the masks in a text.

python -m lladax.generate --model=runs/tiny_text --prompt="ROMEO."
python -m lladax.generate --model=runs/tiny_text --infill="To be, or<|mask|><|mask|> to be"
python -m lladax.generate --model=inclusionAI/LLaDA-MoE-7B-A1B-Instruct --mesh=expert=8 --chat="Hi"
"""

from __future__ import annotations

import json
import sys

from absl import app, flags, logging

import lladax
from lladax.config import ConfigError, fields_help, override
from lladax.infer import SamplerConfig, view
from lladax.sharding import MeshConfig

FLAGS = flags.FLAGS

flags.DEFINE_string(
  "model",
  None,
  "Workdir of a run or one of its checkpoints, a Hugging Face folder or id, or a folder that "
  "`python -m lladax.hub import` wrote.",
  required=True,
)
flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
flags.DEFINE_multi_string(
  "chat", [], "A message to answer, put into the model's chat template; may be given several times."
)
flags.DEFINE_string("infill", None, "Text in which each <|mask|> is replaced by one token.")
flags.DEFINE_integer("seed", 0, "Seed of the first prompt; the others count on from it.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. Default: as saved.")
flags.DEFINE_multi_string(
  "mesh",
  [],
  "Devices that share the model, as axis=size, e.g. --mesh=data=1 --mesh=expert=8. Default: one. "
  "Axes:\n" + fields_help(MeshConfig()),
)
flags.DEFINE_bool("watch", False, "Show the canvas while it is denoised.")
flags.DEFINE_bool("json", False, "Print one JSON object per text instead of the text.")
flags.DEFINE_multi_string(
  "set",
  [],
  "Field of the sampler as name=value, e.g. --set gen_length=64 --set temperature=0.7. Fields:\n"
  + fields_help(SamplerConfig()),
)


def main(_):
  if [bool(FLAGS.prompt), bool(FLAGS.chat), bool(FLAGS.infill)].count(True) != 1:
    raise app.UsageError("give one of --prompt, --chat (once or more) and --infill")
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every file it reads
  try:
    run()
  except (ConfigError, ValueError) as error:
    sys.exit(f"error: {error}")


def run():
  mesh = override(MeshConfig(), FLAGS.mesh) if FLAGS.mesh else None
  model = lladax.load(FLAGS.model, mesh=mesh, dtype=FLAGS.dtype)
  sampler = override(model.sampler, FLAGS.set)
  if FLAGS.infill:
    result = model.infill_tokens([FLAGS.infill], sampler=sampler, seed=FLAGS.seed)
  else:
    prompts = FLAGS.prompt or [model.chat_prompt(message) for message in FLAGS.chat]
    result = model.generate_tokens(prompts, sampler=sampler, seed=FLAGS.seed)
  for row, answer in enumerate(result.answers):
    prompt = FLAGS.infill or (FLAGS.prompt or FLAGS.chat)[row]
    text = model.decode(answer)
    if FLAGS.watch:
      view.show(result, model.decode, row=row, title=prompt)
    if FLAGS.json:
      print(json.dumps({"prompt": prompt, "text": text, "nfe": int(result.nfe[row])}))
    elif not FLAGS.watch:
      print(prompt + text if FLAGS.prompt else text)


if __name__ == "__main__":
  app.run(main)
