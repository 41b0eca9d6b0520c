"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import prometheus_client as prometheus

from lladax.infer.engine import Update

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
  """Counters in a registry of their own, so that several servers can live in one process."""

  def __init__(self):
    self.registry = prometheus.CollectorRegistry()

    def make(kind, name, text, labels=(), **options):
      return kind(f"lladax_{name}", text, labels, registry=self.registry, **options)

    counter, histogram = prometheus.Counter, prometheus.Histogram
    self._requests = make(counter, "requests", "Requests answered.", ("endpoint", "status"))
    self._seconds = make(
      histogram, "request_seconds", "From a request to its last byte.", ("endpoint",),
      buckets=SECONDS,
    )  # fmt: skip
    self._queued = make(histogram, "queue_seconds", "Wait for a free slot.", buckets=SECONDS)
    self._block = make(histogram, "block_seconds", "Decoding one block of a lane.", buckets=SECONDS)
    self._rows = make(
      histogram, "block_rows", "Answers decoded together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
    )
    self._written = make(counter, "tokens_written", "Tokens written, cancelled answers included.")
    self._prompt = make(counter, "tokens_prompt", "Tokens of prompts.")
    self._answer = make(counter, "tokens_answer", "Tokens of answers that were sent.")
    self._passes = make(counter, "forward_passes", "Network passes of finished answers.")
    self._cancelled = make(counter, "cancelled", "Answers that nobody waited for any more.")

  def text(self) -> bytes:
    """All of it in Prometheus' text format."""
    return prometheus.generate_latest(self.registry)

  def value(self, name: str, **labels: str) -> float:
    """One number, 0 if nothing was counted; for tests and the health page."""
    return self.registry.get_sample_value(f"lladax_{name}", labels) or 0.0

  def answered(self, endpoint: str, status: int, seconds: float):
    self._requests.labels(endpoint, str(status)).inc()
    self._seconds.labels(endpoint).observe(seconds)

  def sent(self, *, prompt: int, answer: int, passes: int):
    self._prompt.inc(prompt)
    self._answer.inc(answer)
    self._passes.inc(passes)

  def started(self, seconds: float):
    self._queued.observe(seconds)

  def stepped(self, seconds: float, *, rows: int, updates: Sequence[Update]):
    self._block.observe(seconds)
    self._rows.observe(rows)
    self._written.inc(sum(at >= 0 for update in updates for at in update.revealed_at))

  def cancelled(self, count: int):
    self._cancelled.inc(count)

  def watch(self, **gauges: Callable[[], float]):
    """Numbers that are asked for when somebody reads the metrics: waiting, active, lanes."""
    texts = {
      "waiting": "Answers in the queue.",
      "active": "Answers being decoded.",
      "lanes": "Engines, one for each sampler in use.",
    }
    for name, read in gauges.items():
      gauge = prometheus.Gauge(f"lladax_{name}", texts[name], registry=self.registry)
      gauge.set_function(read)
