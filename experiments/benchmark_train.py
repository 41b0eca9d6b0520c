"""Training speed on this machine: lladax beside the same model in torch, in one run.

The model is the 25M proxy (vocabulary 8192, width 256, 6 layers, 16 experts, top-2, expert width
256) on batches of 16 x 256 tokens; in torch it is an OLMoE of `transformers` with the same shapes
and full attention, its experts once as published (a loop) and once as `grouped_mm`. Every side
draws noise, does forward, backward, clipping and AdamW. The sides run in processes of their own
and take turns, one step each, so that a slow moment of the machine hits all of them.

  pip install -e '.[bench]' && python -m experiments.benchmark_train

The floor is the time that the step's matrix products would take at the speed of a 2048^3 product,
measured in the same process between the steps: 6 * active parameters (the head on every position)
+ 12 * L * D per layer, per token.

Results: README, "Speed on a CPU".
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import time

from absl import app, flags

from lladax.models import count_parameters, proxy_25m

BATCH, LENGTH = 16, 256
MASK_ID = 8191

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 15, "Steps of each side that are timed.", lower_bound=1)
flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes to compare.")
flags.DEFINE_bool("torch", True, "Time torch as well.")
flags.DEFINE_string("json", None, "File to write the results to.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
  """One competitor. `head`: on which positions the output head is computed."""

  framework: str
  dtype: str
  experts: str = "default"
  head: str = "masked"

  @property
  def name(self) -> str:
    return f"{self.framework}, experts {self.experts}, head on {self.head} positions"


def sides(dtype: str, torch: bool) -> list[Side]:
  result = [Side(framework="lladax", dtype=dtype, experts="live_blocks")]
  if torch:
    result += [
      Side(framework="torch", dtype=dtype, experts=experts, head=head)
      for experts in ("eager", "grouped_mm")
      for head in ("all", "masked")
    ]
  return result


def model_flops() -> float:
  """Of one step's matrix products, forward and backward."""
  config = proxy_25m()
  per_token = 6 * count_parameters(config).active
  per_token += 12 * LENGTH * config.hidden_size * config.num_hidden_layers
  return float(per_token * BATCH * LENGTH)


def lladax_step(side: Side):
  """A function that makes one training step, and one that makes one 2048^3 product."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from lladax import host
  from lladax.experiment import Experiment, train_step
  from lladax.models import init_variables
  from lladax.sharding import make_mesh
  from lladax.train import init_state, make_optimizer
  from lladax.types import Batch

  host.keep_memory()
  model = proxy_25m(mask_token_id=MASK_ID, dtype=side.dtype, scan_unroll=6)
  config = Experiment(name="benchmark", model=model)
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = init_state(lambda key: init_variables(model, key)["params"], optimizer, 0, make_mesh())
  update = train_step(config)
  tokens = np.random.default_rng(0).integers(0, 8000, (BATCH, LENGTH)).astype(np.int32)
  ones = np.ones((BATCH, LENGTH), np.int32)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
  batch = Batch(tokens=tokens, segment_ids=ones, positions=positions, maskable=ones > 0)

  def step():
    nonlocal state
    state, metrics = update(state, batch)
    jax.block_until_ready((state.params, metrics))

  square = jnp.ones((2048, 2048), side.dtype)
  product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
  return step, lambda: product(square).block_until_ready()


def torch_step(side: Side):
  """As `lladax_step`. bfloat16 is autocast over float32 parameters, as in lladax."""
  import torch
  from transformers import OlmoeConfig, OlmoeForCausalLM

  config = proxy_25m()
  model = OlmoeForCausalLM._from_config(
    OlmoeConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.moe.expert_intermediate_size,
      num_hidden_layers=config.num_hidden_layers,
      num_attention_heads=config.num_attention_heads,
      num_key_value_heads=config.num_attention_heads,
      num_experts=config.moe.num_experts,
      num_experts_per_tok=config.moe.num_experts_per_tok,
      norm_topk_prob=False,
      max_position_embeddings=LENGTH,
      use_cache=False,
      pad_token_id=None,
      bos_token_id=None,
      eos_token_id=0,
    ),
    experts_implementation=side.experts,
  )
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
  tokens = torch.randint(0, 8000, (BATCH, LENGTH))
  everywhere = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
  low = side.dtype == "bfloat16"

  def step():
    rate = torch.rand(BATCH, 1) * (1 - 1e-3) + 1e-3
    masked = torch.rand(BATCH, LENGTH) < rate
    noisy = torch.where(masked, MASK_ID, tokens)
    cast = torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext()
    with cast:
      hidden = model.model(noisy, attention_mask=everywhere).last_hidden_state
      logits = (
        model.lm_head(hidden)[masked] if side.head == "all" else model.lm_head(hidden[masked])
      )
    nll = torch.nn.functional.cross_entropy(logits.float(), tokens[masked], reduction="none")
    loss = (nll / rate.expand(BATCH, LENGTH)[masked]).sum() / (BATCH * LENGTH)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  square = torch.ones(2048, 2048, dtype=torch.bfloat16 if low else torch.float32)
  return step, lambda: square @ square


def work(side: Side, pipe):
  """A worker: on each request, one step and one product, and how long they took."""
  step, product = (lladax_step if side.framework == "lladax" else torch_step)(side)
  for _ in range(3):
    step(), product()
  pipe.send("ready")
  while pipe.recv() == "go":
    times = []
    for run in (step, product):
      start = time.perf_counter()
      run()
      times.append(time.perf_counter() - start)
    pipe.send(times)


def compare(dtype: str) -> list[dict]:
  """Times every side of a dtype in turns."""
  context = multiprocessing.get_context("spawn")
  pipes, processes = [], []
  for side in (chosen := sides(dtype, FLAGS.torch)):
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(side, theirs), daemon=True)
    process.start()
    if ours.recv() != "ready":  # one at a time: compiling is work too
      raise RuntimeError(f"{side} did not start")
    pipes.append(ours)
    processes.append(process)
  times = [[] for _ in chosen]
  for _ in range(FLAGS.rounds):
    for pipe, row in zip(pipes, times, strict=True):
      pipe.send("go")
      row.append(pipe.recv())
  for pipe in pipes:
    pipe.send("stop")
  ours = [step for step, _ in times[0]]
  rows = []
  for side, row in zip(chosen, times, strict=True):
    steps, products = zip(*row, strict=True)
    speed = 2 * 2048**3 / statistics.median(products)
    median = statistics.median(steps)
    ratio = statistics.median(theirs / mine for theirs, mine in zip(steps, ours, strict=True))
    rows.append({
      "side": side.name, "dtype": dtype, "seconds_per_step": median,
      "tokens_per_s": BATCH * LENGTH / median, "lladax_is_faster_by": ratio,
      "matmul_gflops": speed / 1e9, "time_over_floor": median * speed / model_flops(),
    })  # fmt: skip
  return rows


def main(_):
  results = []
  for dtype in FLAGS.dtypes:
    rows = compare(dtype)
    results += rows
    print(f"\n{dtype}, median of {FLAGS.rounds} steps in turns")
    print(f"{'':58} {'s/step':>7} {'tokens/s':>9} {'lladax is':>10} {'over floor':>11}")
    for row in rows:
      print(
        f"{row['side']:58} {row['seconds_per_step']:7.3f} {row['tokens_per_s']:9.0f} "
        f"{row['lladax_is_faster_by']:8.2f} x {row['time_over_floor']:9.2f} x"
      )
  if FLAGS.json:
    with open(FLAGS.json, "w") as file:
      json.dump(results, file, indent=2)


if __name__ == "__main__":
  app.run(main)
