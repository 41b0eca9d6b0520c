"""An HTTP server in the manner of OpenAI's: requests, continuous batching, answers as they grow."""

try:
  import fastapi  # noqa: F401
  import prometheus_client  # noqa: F401
  import uvicorn  # noqa: F401
except ImportError as error:
  raise ImportError(f"{error}; the server needs it: pip install 'lladax[serve]'") from None

from lladax.serve.answers import Answer
from lladax.serve.app import make_app
from lladax.serve.metrics import Metrics
from lladax.serve.protocol import Ask, Limits, RequestError, parse_chat, parse_completion
from lladax.serve.scheduler import Job, QueueFull, Refused, Scheduler, Stopping
from lladax.serve.served import Served

__all__ = [
  "Answer",
  "Ask",
  "Job",
  "Limits",
  "Metrics",
  "QueueFull",
  "Refused",
  "RequestError",
  "Scheduler",
  "Served",
  "Stopping",
  "make_app",
  "parse_chat",
  "parse_completion",
]
