"""Training: optimizer, state, step, checkpoints, metrics and the loop."""

from lladax.train.checkpoint import CheckpointError, Checkpoints, load_params
from lladax.train.diffusion import make_diffusion_step
from lladax.train.expert_bias import BiasUpdate
from lladax.train.guards import (
  GuardConfig,
  GuardError,
  Rollback,
  Spike,
  SpikeGuard,
  StepBack,
  add_rollback,
  plan_rollback,
  read_rollbacks,
)
from lladax.train.heldout import heldout_bound
from lladax.train.loop import (
  NonFiniteError,
  Stopped,
  every,
  fit,
  place,
  stop_on_nonfinite,
  warn_of_drops,
)
from lladax.train.metrics import Metrics, evaluated, read_records, write_run_record
from lladax.train.noise_watch import NoiseDrift, NoiseWatch
from lladax.train.optimizer import (
  AdamW,
  Muon,
  OptimizerConfig,
  UpdateRule,
  ema_params,
  learning_rate,
  make_optimizer,
)
from lladax.train.routing import router_load, router_metrics
from lladax.train.schedules import Constant, CosineDecay, LearningRate, Plateaus, Wsd
from lladax.train.state import (
  TrainState,
  abstract_state,
  init_state,
  state_from,
  state_shardings,
)
from lladax.train.step import Balance, make_train_step

__all__ = [
  "AdamW",
  "Balance",
  "BiasUpdate",
  "CheckpointError",
  "Checkpoints",
  "Constant",
  "CosineDecay",
  "GuardConfig",
  "GuardError",
  "LearningRate",
  "Metrics",
  "Muon",
  "NoiseDrift",
  "NoiseWatch",
  "NonFiniteError",
  "OptimizerConfig",
  "Plateaus",
  "Rollback",
  "Spike",
  "SpikeGuard",
  "StepBack",
  "Stopped",
  "TrainState",
  "UpdateRule",
  "Wsd",
  "abstract_state",
  "add_rollback",
  "ema_params",
  "evaluated",
  "every",
  "fit",
  "heldout_bound",
  "init_state",
  "learning_rate",
  "load_params",
  "make_diffusion_step",
  "make_optimizer",
  "make_train_step",
  "place",
  "plan_rollback",
  "read_records",
  "read_rollbacks",
  "router_load",
  "router_metrics",
  "state_from",
  "state_shardings",
  "stop_on_nonfinite",
  "warn_of_drops",
  "write_run_record",
]
