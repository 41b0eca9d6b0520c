"""Serve a model over HTTP, in the manner of OpenAI's API, with a page that shows the denoising.

python -m lladax.serve --model=runs/tiny_text
python -m lladax.serve --model=inclusionAI/LLaDA-MoE-7B-A1B-Instruct --dtype=bfloat16 --slots=8

Then open http://127.0.0.1:8000/ or point any OpenAI client at http://127.0.0.1:8000/v1.
LLADAX_API_KEY in the environment is asked of every client. Ctrl-C or SIGTERM ends the server once
the answers that it has begun are done; its exit status is then 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import sys

import uvicorn
from absl import app, flags, logging

from lladax.config import ConfigError
from lladax.model_flags import define_flags, open_model
from lladax.serve import Limits, Metrics, Scheduler, Served, make_app
from lladax.serve.address import bind

FLAGS = flags.FLAGS

define_flags()
flags.DEFINE_string("name", None, "What clients call the model. Default: the last part of --model.")
flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for every one.")
flags.DEFINE_integer(
  "port", 8000, "Port to listen at; 0 for a free one.", lower_bound=0, upper_bound=65535
)
flags.DEFINE_integer(
  "slots",
  8,
  "Answers decoded together, for each sampler in use. All slots are computed, taken or not, so that "
  "an answer does not depend on how many there are: for one user on a CPU choose 1.",
  lower_bound=1,
)
flags.DEFINE_integer("max_queue", 64, "Answers that may wait; more are refused.", lower_bound=1)
flags.DEFINE_integer(
  "max_samplers", 4, "Samplers in use at a time; each has slots of its own.", lower_bound=1
)
flags.DEFINE_integer(
  "length", None, "Tokens of prompt and answer. Default: the model's context, at most 4096."
)
flags.DEFINE_integer("max_tokens", 1024, "Most tokens of one answer.", lower_bound=1)
flags.DEFINE_integer(
  "max_answers", 16, "Most answers to one request; no more than --max_queue.", lower_bound=1
)
flags.DEFINE_integer("max_body", 1 << 20, "Most bytes of a request.", lower_bound=1)
flags.DEFINE_bool("open_sampler", False, "Let requests set any field of the sampler.")
flags.DEFINE_float(
  "drain_seconds", 30.0, "Time for the last answers when the server ends.", lower_bound=0
)
flags.DEFINE_bool("warm_up", True, "Compile before the first request comes.")


def main(_):
  logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every file it reads
  try:
    listening = bind(FLAGS.host, FLAGS.port)
    model = open_model()
    name = FLAGS.name or pathlib.PurePath(os.path.abspath(FLAGS.model)).name
    length = FLAGS.length or min(model.config.max_position_embeddings, 4096)
    served = Served(model=model, name=name, length=length, open_sampler=FLAGS.open_sampler)
    served.check()
    served = dataclasses.replace(served, model=model.for_inference(weights=FLAGS.weights))
    rows = min(FLAGS.max_answers, FLAGS.max_queue)  # more would never find room in the queue
    limits = Limits(max_tokens=FLAGS.max_tokens, rows=rows, body_bytes=FLAGS.max_body)
  except (ConfigError, ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  metrics = Metrics()
  scheduler = Scheduler(
    lambda config: served.model.engine(sampler=config, slots=FLAGS.slots, length=length),
    max_queue=FLAGS.max_queue,
    max_lanes=FLAGS.max_samplers,
    context=served.model.on_mesh,
    metrics=metrics,
  )
  application = make_app(
    served,
    scheduler,
    metrics=metrics,
    limits=limits,
    # Secrets that are kept in files often end with a line break.
    api_key=os.environ.get("LLADAX_API_KEY", "").strip() or None,
    drain_seconds=FLAGS.drain_seconds,
    warm_up=FLAGS.warm_up,
  )
  server = uvicorn.Server(
    uvicorn.Config(
      application,
      host=FLAGS.host,
      port=FLAGS.port,
      log_level="warning",
      timeout_graceful_shutdown=round(FLAGS.drain_seconds),
    )
  )
  print(f"{name}: compiling", file=sys.stderr, flush=True)
  port = listening.getsockname()[1]
  host = f"[{FLAGS.host}]" if ":" in FLAGS.host else FLAGS.host

  def ready():
    # An error here, and not in uvicorn, which may wait for ever: of two servers that were started at
    # the same time the other one listens by now.
    listening.listen()
    print(f"{name}: http://{host}:{port}/ (for clients: /v1)", file=sys.stderr, flush=True)

  application.state.ready = ready
  # uvicorn passes a signal on once it has shut down; by then all is done that it asks for.
  signal.signal(signal.SIGTERM, lambda *_: None)
  with contextlib.suppress(KeyboardInterrupt):
    server.run(sockets=[listening])


if __name__ == "__main__":
  app.run(main)
