"""Write text with a trained model: continue prompts, or fill the masks in a text.

python -m lladax.generate --model=runs/tiny_text --prompt="ROMEO."
python -m lladax.generate --model=runs/tiny_text --infill="To be, or<|mask|><|mask|> to be"
"""

from __future__ import annotations

import json
import sys

from absl import app, flags, logging

import lladax
from lladax.config import ConfigError, fields_help, override
from lladax.infer import SamplerConfig, view

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "Workdir of a run, or one of its checkpoints.", required=True)
flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
flags.DEFINE_string("infill", None, "Text in which each <|mask|> is replaced by one token.")
flags.DEFINE_integer("seed", 0, "Seed of the first prompt; the others count on from it.")
flags.DEFINE_bool("watch", False, "Show the canvas while it is denoised.")
flags.DEFINE_bool("json", False, "Print one JSON object per text instead of the text.")
flags.DEFINE_multi_string(
  "set",
  [],
  "Field of the sampler as name=value, e.g. --set gen_length=64 --set temperature=0.7. Fields:\n"
  + fields_help(SamplerConfig()),
)


def main(_):
  if bool(FLAGS.prompt) == bool(FLAGS.infill):
    raise app.UsageError("give either --prompt (once or more) or --infill")
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every file it reads
  try:
    run()
  except (ConfigError, ValueError) as error:
    sys.exit(f"error: {error}")


def run():
  model = lladax.load(FLAGS.model)
  sampler = override(model.sampler, FLAGS.set)
  if FLAGS.infill:
    result = model.infill_tokens([FLAGS.infill], sampler=sampler, seed=FLAGS.seed)
  else:
    result = model.generate_tokens(FLAGS.prompt, sampler=sampler, seed=FLAGS.seed)
  for row, answer in enumerate(result.answers):
    prompt = FLAGS.infill or FLAGS.prompt[row]
    text = model.tokenizer.decode(answer)
    if FLAGS.watch:
      view.show(result, model.tokenizer.decode, row=row, title=prompt)
    if FLAGS.json:
      print(json.dumps({"prompt": prompt, "text": text, "nfe": int(result.nfe[row])}))
    elif not FLAGS.watch:
      print(text if FLAGS.infill else prompt + text)


if __name__ == "__main__":
  app.run(main)
