"""What `benchmark_kernels` times: each operation by each implementation that runs here."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark_torch
from kernels_pallas import attention, cross_entropy, expert_ffn, fused_moe, op, permute
from kernels_pallas.grouped_matmul import live_blocks, pallas_tpu
from kernels_pallas.grouped_matmul.ragged_dot import RaggedDot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """Shapes of one mixture-of-experts layer, of decoding, attention and the head; who takes part."""

  tokens: int
  slots: int = 8
  experts: int = 64
  depth: int = 2048
  width: int = 1024
  decoded: tuple[int, ...] = (8, 64, 256)
  attention: tuple[int, int, int, int] = (2, 4096, 16, 128)  # B, L, N, H
  head: tuple[int, int] = (8192, 157184)  # T, V
  dense: int = 8192
  copied: int = 1 << 30
  dtype: str = "bfloat16"
  skew: float = 0.0  # expert e gets slots as (e + 1)^-skew
  torch: bool = True

  @property
  def rows(self) -> int:
    return self.tokens * self.slots


SIZES = {
  "llada_moe": Setting(tokens=8192),
  "small": Setting(
    tokens=512,
    slots=2,
    experts=8,
    depth=256,
    width=128,
    decoded=(8,),
    attention=(2, 256, 4, 64),
    head=(256, 8192),
    dense=1024,
    copied=1 << 24,
  ),
  "tiny": Setting(
    tokens=32,
    slots=2,
    experts=4,
    depth=32,
    width=16,
    decoded=(4,),
    attention=(1, 32, 2, 16),
    head=(32, 64),
    dense=64,
    copied=1 << 12,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One operation by one implementation. `make(turn)`: operands; `wait`: until a result is there."""

  name: str
  implementation: str
  run: Callable
  make: Callable[[int], tuple]
  flops: float = 0.0
  bytes: float = 0.0
  wait: Callable = jax.block_until_ready
  fetch: Callable = lambda result: result  # as arrays that NumPy takes


def draw(*shapes, turn: int, dtype) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(turn), len(shapes))
  return [
    jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5
    for key, shape in zip(keys, shapes, strict=True)
  ]


TORCH = dict(wait=benchmark_torch.wait, fetch=benchmark_torch.fetch)


def installed(package: str) -> bool:
  return importlib.util.find_spec(package) is not None


def slots_per_expert(setting: Setting) -> np.ndarray:
  """int32[E]: as a router would give that prefers no expert (or, with --skew, the first)."""
  weights = np.arange(1, setting.experts + 1) ** -setting.skew
  rng = np.random.default_rng(0)
  return rng.multinomial(setting.rows, weights / weights.sum()).astype(np.int32)


def back_ends() -> dict[str, object]:
  """Modules with the passes of a grouped matmul that run on this platform."""
  others = {"jax.lax.ragged_dot": RaggedDot("jax")}
  if installed("tokamax"):
    others["tokamax"] = RaggedDot("tokamax")
  if jax.default_backend() == "gpu":
    from kernels_pallas.grouped_matmul import mosaic_gpu, triton

    return {"mosaic_gpu": mosaic_gpu, "triton": triton, **others}
  if jax.default_backend() == "tpu":
    return {"pallas_tpu": pallas_tpu, **others}
  return {"live_blocks": live_blocks, **others}


def tiled(name: str, step: str, shape: tuple[int, ...], dtype):
  """The tiling that `kernels_pallas.tune` found for a kernel, if any."""
  if name not in ("mosaic_gpu", "triton", "pallas_tpu"):
    return None
  return op.tuned(f"grouped_matmul.{name}.{step}", shape, dtype)


def grouped_matmul_cases(setting: Setting) -> Iterator[Case]:
  sizes = jnp.array(slots_per_expert(setting))
  rows, experts, depth, width = setting.rows, setting.experts, setting.depth, setting.width
  left, weights, grad = (rows, depth), (experts, depth, width), (rows, width)
  itemsize = jnp.dtype(setting.dtype).itemsize
  passes = {
    "fwd": ("forward", (left, weights), {}),
    "dlhs": ("forward", (grad, weights), dict(transpose_rhs=True)),
    "drhs": ("gradient_rhs", (left, grad), dict(dtype=jnp.dtype(setting.dtype))),
  }
  names = {"fwd": "forward", "dlhs": "forward_transposed", "drhs": "gradient_rhs"}
  for key, (step, shapes, static) in passes.items():
    common = dict(
      name=f"grouped_matmul {key}",
      flops=2.0 * rows * depth * width,
      bytes=float(itemsize * (rows * (depth + width) + experts * depth * width)),
    )
    make = lambda turn, shapes=shapes: draw(*shapes, turn=turn, dtype=setting.dtype)  # noqa: E731
    inner, outer = (width, depth) if key == "dlhs" else (depth, width)
    for name, module in back_ends().items():
      tiling = tiled(name, names[key], (rows, experts, inner, outer), setting.dtype)

      def run(a, b, module=module, step=step, static=static, tiling=tiling):
        return getattr(module, step)(a, b, sizes, tiling=tiling, **static)

      yield Case(implementation=name, run=jax.jit(run), make=make, **common)
    if setting.torch and installed("torch"):
      run = benchmark_torch.grouped_matmul(key, np.asarray(sizes))
      operands = benchmark_torch.maker(make)
      yield Case(implementation="torch", run=run, make=operands, **TORCH, **common)


def swiglu_cases(setting: Setting) -> Iterator[Case]:
  sizes = jnp.array(slots_per_expert(setting))
  rows, experts, depth, width = setting.rows, setting.experts, setting.depth, setting.width
  shapes = (rows, depth), (experts, depth, 2 * width)
  for keep in (False, True):
    numbers = rows * (depth + width * (3 if keep else 1)) + experts * depth * 2 * width
    for name, module in back_ends().items():
      tiling = tiled(name, "swiglu", (rows, experts, depth, 2 * width), setting.dtype)

      def run(a, b, module=module, keep=keep, tiling=tiling):
        return module.swiglu(a, b, sizes, keep=keep, tiling=tiling)

      yield Case(
        name="swiglu, products kept" if keep else "swiglu",
        implementation=name,
        run=jax.jit(run),
        make=lambda turn: draw(*shapes, turn=turn, dtype=setting.dtype),
        flops=4.0 * rows * depth * width,
        bytes=float(numbers * jnp.dtype(setting.dtype).itemsize),
      )


def permute_cases(setting: Setting) -> Iterator[Case]:
  slots, tokens, rows = setting.slots, setting.tokens, setting.rows
  order = np.random.default_rng(0).permutation(rows).astype(np.int32)
  inverse = jnp.array(np.argsort(order).astype(np.int32))
  order = jnp.array(order)
  weights = jnp.full((tokens, slots), 1 / slots, jnp.float32)
  size = float(jnp.dtype(setting.dtype).itemsize * setting.depth)
  kernel = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(jax.default_backend())
  for name in filter(None, (kernel, "reference")):

    def dispatch(x, name=name):
      return permute.dispatch(x, order, inverse, slots, implementation=name)

    def combine(y, name=name):
      return permute.combine(y, weights, order, inverse, implementation=name)

    def backward(y, grad, combine=combine):
      return jax.vjp(combine, y)[1](grad)

    shown = "jax.numpy" if name == "reference" else name
    for title, run, shapes, moved in (
      ("dispatch", dispatch, [(tokens, setting.depth)], tokens + rows),
      ("combine", combine, [(rows, setting.depth)], tokens + rows),
      (
        "combine, gradient",
        backward,
        [(rows, setting.depth), (tokens, setting.depth)],
        tokens + rows,
      ),
    ):
      yield Case(
        name=title,
        implementation=shown,
        run=jax.jit(run),
        make=lambda turn, shapes=shapes: draw(*shapes, turn=turn, dtype=setting.dtype),
        bytes=size * moved,
      )
  if setting.torch and installed("torch"):
    run = benchmark_torch.dispatch(np.asarray(order) // slots)
    make = benchmark_torch.maker(
      lambda turn: draw((tokens, setting.depth), turn=turn, dtype=setting.dtype)
    )
    yield Case(
      name="dispatch",
      implementation="torch",
      run=run,
      make=make,
      bytes=size * (tokens + rows),
      **TORCH,
    )


def fused_moe_cases(setting: Setting) -> Iterator[Case]:
  """Few tokens: the time is that of reading the weights of the experts that they chose."""
  experts, depth, width, slots = setting.experts, setting.depth, setting.width, setting.slots
  rng = np.random.default_rng(0)
  for tokens in setting.decoded:
    chosen = np.stack([rng.permutation(experts)[:slots] for _ in range(tokens)]).astype(np.int32)
    active, weights = len(np.unique(chosen)), jnp.full((tokens, slots), 1 / slots, jnp.float32)
    order = np.argsort(chosen.reshape(-1), kind="stable").astype(np.int32)
    inverse, sizes = np.argsort(order), np.bincount(chosen.reshape(-1), minlength=experts)
    route = [jnp.array(x, jnp.int32) for x in (order, inverse, sizes)]
    common = dict(
      name=f"decoding layer, {tokens} tokens",
      make=lambda turn, tokens=tokens: draw(
        (tokens, depth),
        (experts, depth, 2 * width),
        (experts, width, depth),
        turn=turn,
        dtype=setting.dtype,
      ),
      flops=6.0 * tokens * slots * depth * width,
    )
    full, chosen = 3.0 * active * depth * width, jnp.array(chosen)

    def plain(x, gate_up, down, weights=weights, chosen=chosen):
      return fused_moe.fused_moe(x, gate_up, down, weights, chosen)

    def grouped(x, gate_up, down, weights=weights, route=route):
      return expert_ffn.expert_ffn(x, gate_up, down, weights, *route)

    yield Case(
      implementation="fused_moe",
      run=jax.jit(plain),
      bytes=full * jnp.dtype(setting.dtype).itemsize,
      **common,
    )
    yield Case(
      implementation="expert_ffn",
      run=jax.jit(grouped),
      bytes=full * jnp.dtype(setting.dtype).itemsize,
      **common,
    )
    for narrow in (jnp.int8, jnp.float8_e4m3fn):

      def quantized(turn, make=common["make"], narrow=narrow):
        x, gate_up, down = make(turn)
        return x, *fused_moe.quantize(gate_up, down, narrow)

      kwargs = common | dict(make=quantized, bytes=full)
      name = f"fused_moe, {jnp.dtype(narrow).name} weights"
      yield Case(implementation=name, run=jax.jit(plain), **kwargs)


def attention_cases(setting: Setting) -> Iterator[Case]:
  batch, length, heads, size = setting.attention
  flops = 4.0 * batch * heads * length**2 * size
  make = lambda turn: draw(*[setting.attention] * 4, turn=turn, dtype=setting.dtype)  # noqa: E731
  # The written-out scores of the whole batch are 4 B N L^2 bytes.
  names = (None, "chunked", "reference")
  for name in names:
    call = lambda q, k, v, name=name: attention.attention(q, k, v, implementation=name)  # noqa: E731

    def both(q, k, v, grad, call=call):
      out, vjp = jax.vjp(call, q, k, v)
      return out, *vjp(grad)

    kwargs = dict(implementation=name or "attention (chosen)", make=make)
    run = jax.jit(lambda q, k, v, grad, call=call: call(q, k, v))
    yield Case(name="attention fwd", run=run, flops=flops, **kwargs)
    yield Case(name="attention fwd and bwd", run=jax.jit(both), flops=3.5 * flops, **kwargs)
  if setting.torch and installed("torch"):
    yield Case(
      name="attention fwd",
      implementation="torch",
      run=benchmark_torch.attention,
      make=benchmark_torch.maker(make),
      flops=flops,
      **TORCH,
    )


def cross_entropy_cases(setting: Setting) -> Iterator[Case]:
  tokens, words = setting.head
  targets = jnp.array(np.random.default_rng(0).integers(words, size=tokens), jnp.int32)
  weights = jnp.full((tokens,), 1 / tokens, jnp.float32)
  for name in (None, "reference"):

    def loss(hidden, kernel, name=name):
      return cross_entropy.weighted_nll(hidden, kernel, targets, weights, implementation=name)[0]

    yield Case(
      name="cross_entropy fwd and bwd",
      implementation=name or "cross_entropy (chosen)",
      run=jax.jit(jax.value_and_grad(loss, (0, 1))),
      make=lambda turn: draw(
        (tokens, setting.depth), (setting.depth, words), turn=turn, dtype=setting.dtype
      ),
      flops=6.0 * tokens * setting.depth * words,
    )


CASES = {
  "grouped_matmul": grouped_matmul_cases,
  "swiglu": swiglu_cases,
  "permute": permute_cases,
  "fused_moe": fused_moe_cases,
  "attention": attention_cases,
  "cross_entropy": cross_entropy_cases,
}
