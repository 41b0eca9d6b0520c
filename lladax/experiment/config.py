"""An experiment as one config: everything that decides how a run goes."""

from __future__ import annotations

import dataclasses

from lladax.data import BatchesConfig, DataConfig
from lladax.diffusion import Objective
from lladax.experiment.start import Best, Start
from lladax.infer import SamplerConfig
from lladax.models import ModelConfig
from lladax.sharding import MeshConfig
from lladax.train import GuardConfig, OptimizerConfig, make_optimizer
from lladax.tune import LoraConfig

# A run may be resumed with other values of these: they change neither its noise nor its data nor
# its mathematics but for rounding, or (steps) say how long it goes on.
RESUMABLE = (
  "steps", "microbatches", "mesh", "sampler", "log_every", "eval_every", "save_every", "keep",
  "keep_every", "keep_best", "guard", "on_drift", "max_nonfinite", "profile_steps", "data.prefetch", "model.dtype",
  "model.param_dtype", "model.remat", "model.scan_unroll",
  "model.moe.exchange", "model.moe.implementation",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything that decides how a run goes.

  Attributes:
    name: of the run; its default workdir is `runs/<name>`.
    model: the network. Its special ids are set to those of the tokenizer.
    objective: the loss and the noise.
    data: text, tokenizer and batches.
    optimizer: AdamW and its learning rate.
    sampler: how the trained model decodes unless told otherwise.
    mesh: devices by axis.
    start: another run, or released weights, to begin with; None: fresh parameters.
    lora: train adapters of the weights of `start`, and leave those as they are; None: train all.
    seed: of the parameters and of the noise; the order of the data has its own.
    steps: length of the run.
    microbatches: parts of the batch that go through the network one after the other.
    log_every: steps per record of the metrics.
    eval_every: steps between evaluations.
    save_every: steps between checkpoints.
    keep: checkpoints kept, the newest.
    keep_every: multiples of this step are kept besides.
    keep_best: the checkpoint with the best evaluation is kept besides, e.g. `Best("heldout/nll")`.
    profile_steps: first and last step of which a trace is written to `<workdir>/profile`.
    guard: when the run is set back to a checkpoint by itself; None: never.
    on_drift: "warn" of noise that is not the schedule's, or "stop" the run.
    max_nonfinite: steps in a row with a loss or gradient that is not finite, at which a run ends.

  Raises:
    ValueError: for numbers out of range, or parts that do not fit each other.
  """

  name: str
  model: ModelConfig
  objective: Objective = Objective()
  data: BatchesConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  sampler: SamplerConfig = SamplerConfig()
  mesh: MeshConfig = MeshConfig()
  start: Start | None = None
  lora: LoraConfig | None = None
  seed: int = 0
  steps: int = 1000
  microbatches: int = 1
  log_every: int = 10
  eval_every: int = 500
  save_every: int = 500
  keep: int = 2
  keep_every: int | None = None
  keep_best: Best | None = None
  profile_steps: tuple[int, int] | None = None
  guard: GuardConfig | None = None
  on_drift: str = "warn"
  max_nonfinite: int = 20

  def __post_init__(self):
    for field in ("steps", "microbatches", "log_every", "eval_every", "save_every", "keep",
                  "max_nonfinite"):  # fmt: skip
      if getattr(self, field) < 1:
        raise ValueError(f"{field} is at least 1; got {getattr(self, field)}")
    if self.data.batch_size % self.microbatches:
      raise ValueError(
        f"data.batch_size {self.data.batch_size} does not split into {self.microbatches} "
        "microbatches"
      )
    if self.data.length > self.model.max_position_embeddings:
      raise ValueError(
        f"data.length {self.data.length} is longer than the model's context, "
        f"model.max_position_embeddings {self.model.max_position_embeddings}"
      )
    if self.lora is not None and self.start is None:
      raise ValueError("lora adapts the weights of a start; say which with start=Start(path=...)")
    if self.on_drift not in ("warn", "stop"):
      raise ValueError(f"on_drift is 'warn' or 'stop'; got {self.on_drift!r}")
    if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
      raise ValueError(
        f"profile_steps are the first and the last step, counted from 1; got {self.profile_steps}"
      )
    make_optimizer(self.optimizer, self.steps)
