"""The experts' layer for a few tokens on TPUs: every active expert streamed once through VMEM.

The grid is (2, active experts, tiles of F). A step brings one tile of an expert's gate, up and down
matrices, 3 * D * tile weights; the Pallas pipeline fetches the next step's tile meanwhile, from
where the prefetched list of active experts says. Tokens, hidden activations, the expert's output
and the weighted sum over experts stay in VMEM.

The first axis is for chips with two cores that act as one device (v5p): one core takes the even
experts, the other the odd ones, and their sums are added at the end. It is there on every chip,
since a token's sum must be of the same order whatever the chip and the other tokens. The axis in
the middle has dynamic length. Where one half has fewer experts, its last steps name a tile that
is there already, so that nothing is fetched.

Rows. Up to `ROWS` tokens each expert multiplies all rows, and the combine keeps those it was chosen
for. That is free: in bfloat16 a weight (2 bytes) is used for 2 * ROWS = 256 operations, 128 per
byte, while a chip computes 240 (v5e), 187 (v5p), 561 (v6e) or 312 (tpu7x) operations in the time of
a byte (TFLOP/s over TB/s: 197/0.82, 459/2.46, 920/1.64, 2310/7.40, as in JAX's table of TPUs); and
fewer rows would hardly be faster, a systolic array being loaded with 128 rows of weights at a time.
In eight bits it is 256 per byte, a little more than v5e and v5p can. With more tokens an expert's own
rows are gathered in VMEM first (k rows per token, a few vector registers each) and multiplied
`ROWS` at a time. The product has the same shape in both cases, so results are the same bits.

Tile. `WEIGHT_BYTES` = 12 MiB holds two tiles of each matrix: at D 2048 in bfloat16 512 columns of
F, 6 MiB a step, fetched in 7.7 us (v5e) or 1.7 us (a core of tpu7x): long against a step's
overhead, below 0.5 us. It is the same on all chips: it fits 64 MiB (v5p, tpu7x) as it fits 128 MiB
(v5e, v6e), and the order of sums follows from it. The rest is for tokens: 512 of them at D 4096
take 40 MiB of float32 rows (`_vmem_bytes`).

Speed is unmeasured: these kernels were compiled for every chip, but have run interpreted only.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import op
from kernels_pallas.fused_moe.active import Active, find_active
from kernels_pallas.fused_moe.quantize import Weights, split

ROWS = 128
LANES = 128
WEIGHT_BYTES = 12 << 20
# What a kernel may take of 64 MiB, the smallest VMEM; the rest is for what the compiler keeps.
VMEM_BYTES = 54 << 20


def forward(
  x: jax.Array,
  gate_up: Weights,
  down: Weights,
  weights: jax.Array,
  experts: jax.Array,
  *,
  rows: int = ROWS,
  tile: int | None = None,
) -> jax.Array:
  """See `kernels_pallas.fused_moe.api.fused_moe`.

  A tile that does not divide F makes a padded copy of all weights in every call: correct, but for
  speed F should be a multiple of 128, as it is in published models.

  Args:
    x, gate_up, down, weights, experts: as there.
    rows: rows of one product.
    tile: columns of F in one step, a multiple of 128 unless interpreted; None chooses.

  Raises:
    ValueError: if tokens and tiles do not fit VMEM.
  """
  tile = tile or choose_tile(*down.shape[1:], down.dtype, x.dtype)
  need = _vmem_bytes(x, down.dtype, rows, tile)
  if need > VMEM_BYTES:
    raise ValueError(
      f"{x.shape[0]} tokens of width {x.shape[1]} need {need >> 20} MiB of vector memory, more "
      f"than {VMEM_BYTES >> 20}: fused_moe is for few tokens, kernels_pallas.expert_ffn for many"
    )
  return _forward(
    x, gate_up, down, weights, experts, rows=rows, tile=tile, interpret=op.interpreted()
  )


def choose_tile(width: int, depth: int, stored, used) -> int:
  """Columns of F per step: the largest multiple of 128 that divides F and fits `WEIGHT_BYTES`.

  Of an F that 128 does not divide, the largest multiple that fits and is not past the next one.
  """
  fits = max(1, WEIGHT_BYTES // (3 * depth * _bytes_per_weight(stored, used) * LANES))
  lanes = pl.cdiv(width, LANES)
  if width % LANES:
    return LANES * min(fits, lanes)
  return LANES * max(n for n in range(1, min(fits, lanes) + 1) if lanes % n == 0)


def _bytes_per_weight(stored, used):
  """Two tiles for the pipeline, and in another type the one in use."""
  stored, used = jnp.dtype(stored), jnp.dtype(used)
  return 2 * stored.itemsize + (used.itemsize if stored != used else 0)


def _vmem_bytes(x, stored, rows, tile):
  """Blocks in VMEM (weights and outputs twice, for the pipeline), scratch, and what is computed."""
  (tokens, depth), size = x.shape, x.dtype.itemsize
  padded = pl.cdiv(tokens, rows) * rows
  weights = 3 * depth * tile * _bytes_per_weight(stored, x.dtype) + 3 * 4 * rows * tile
  if tokens > rows:
    return weights + padded * depth * (4 + 2 * 4 + 2 * 4)  # x, out, own and total
  return weights + padded * (depth * (size + 2 * 4 + 4) + 2 * 4 * LANES)


class Schedule(NamedTuple):
  """What the index maps and the kernel read, prefetched as scalars. S = T * k slots.

  expert: int32[2 * n], those of even number in the first n places, those of odd in the last.
  count: int32[2], how many of each there are.
  rest: int32[2], which tile of F the steps of a half that has no more experts name.
  start, size: int32[E], an expert's slots.
  token, weight: int32[S], float32[S], of each slot in expert order.
  """

  expert: jax.Array
  count: jax.Array
  rest: jax.Array
  start: jax.Array
  size: jax.Array
  token: jax.Array
  weight: jax.Array


def make_schedule(active: Active, weights: jax.Array, tiles: int) -> Schedule:
  """`Active` experts dealt out to the halves of the grid."""
  listed = active.experts.size
  present = jnp.arange(listed) < active.count

  def half(parity):
    mine = present & (active.experts % 2 == parity)
    return active.experts[jnp.argsort(~mine, stable=True)], mine.sum(dtype=jnp.int32)

  (even, n_even), (odd, n_odd) = half(0), half(1)
  # A half without experts names a tile that the other fetches anyway: the next or the last one.
  idle_even, idle_odd = jnp.full_like(even, odd[0]), jnp.full_like(odd, even[n_even - 1])
  slots = active.order
  return Schedule(
    expert=jnp.concatenate(
      [jnp.where(n_even > 0, even, idle_even), jnp.where(n_odd > 0, odd, idle_odd)]
    ),
    count=jnp.stack([n_even, n_odd]),
    rest=jnp.stack([jnp.where(n_even > 0, tiles - 1, 0), jnp.int32(tiles - 1)]),
    start=active.starts,
    size=active.sizes,
    token=slots // weights.shape[1],
    weight=weights.astype(jnp.float32).reshape(-1)[slots],
  )


def tile_at(half, i, f, schedule: Schedule):
  """(expert, tile of F) that step (half, i, f) of the grid needs: what every index map follows."""
  count = schedule.count[half]
  expert = schedule.expert[half * (schedule.expert.shape[0] // 2) + _clip(i, count)]
  return expert, jnp.where(i < count, f, schedule.rest[half])


def _clip(i, count):
  return jnp.maximum(jnp.minimum(i, count - 1), 0)


@functools.partial(jax.jit, static_argnames=("rows", "tile", "interpret"))
def _forward(x, gate_up, down, weights, experts, *, rows, tile, interpret):
  from jax.experimental.pallas import tpu as pltpu

  (tokens, depth), padded = x.shape, pl.cdiv(x.shape[0], rows) * rows
  need, gathered = _vmem_bytes(x, down.dtype, rows, tile), tokens > rows
  matrices, scales = _operands(gate_up, down, tile)
  tiles = matrices[-1].shape[1] // tile
  active = find_active(experts, down.shape[0])
  schedule = make_schedule(active, weights, tiles)

  fill = (0, padded - tokens), (0, 0)
  routed = jnp.pad(x, fill), jnp.pad(experts, fill, constant_values=-1), jnp.pad(weights, fill)
  # Single rows are moved in 32 bits: two of bfloat16 share a register's sublane.
  routed = [routed[0].astype(jnp.float32)] if gathered else routed
  row_block = pltpu.VMEM((padded, depth), jnp.float32)
  call = pl.pallas_call(
    functools.partial(
      _kernel, dtype=x.dtype, rows=rows, tiles=tiles, gathered=gathered, scaled=bool(scales)
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(2, jnp.maximum(schedule.count.max(), 1), tiles),
      in_specs=[
        *(
          pl.BlockSpec(array.shape, lambda half, i, f, s: (0, 0), pipeline_mode=pl.Buffered(1))
          for array in routed
        ),
        *_weight_specs(depth, tile, tiles),
        *(_scale_specs(depth, tile, tiles) if scales else ()),
      ],
      out_specs=pl.BlockSpec((None, padded, depth), lambda half, i, f, s: (half, 0, 0)),
      scratch_shapes=[row_block] * (2 if gathered else 1),
    ),
    out_shape=op.shape_like((2, padded, depth), jnp.float32, x, experts),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=need + (10 << 20),
    ),
    cost_estimate=_cost(x, down, experts, rows),
    interpret=interpret,
    name="fused_moe",
  )
  with op.for_target():
    even, odd = call(schedule, *routed, *matrices, *scales)
  return (even + odd)[:tokens].astype(x.dtype)


def _cost(x, down, experts, rows):
  """Of as many experts as may be active; how many are is not known before it runs."""
  listed, width, depth = min(down.shape[0], experts.size), *down.shape[1:]
  multiplied = listed * rows if x.shape[0] <= rows else experts.size
  return pl.CostEstimate(
    flops=6 * multiplied * width * depth,
    bytes_accessed=3 * listed * width * depth * down.dtype.itemsize + 16 * x.size,
    transcendentals=multiplied * width,
  )


def _operands(gate_up, down, tile):
  """Matrices (gate and up are one array, cut twice) and scales as the kernel takes them."""
  (gate_up, gate_up_scale), (down, down_scale) = split(gate_up), split(down)
  count, width, depth = down.shape
  missing = -width % tile
  if missing:
    halves = gate_up.reshape(count, depth, 2, width)
    gate_up = jnp.pad(halves, ((0, 0), (0, 0), (0, 0), (0, missing))).reshape(count, depth, -1)
    down = jnp.pad(down, ((0, 0), (0, missing), (0, 0)))
  matrices = [gate_up, gate_up, down]
  if gate_up_scale is None and down_scale is None:
    return matrices, []
  if gate_up_scale is None:
    gate_up_scale = jnp.ones((count, 2 * width), jnp.float32)
  if down_scale is None:
    down_scale = jnp.ones((count, depth), jnp.float32)
  halves = gate_up_scale.reshape(count, 2, width)
  scale = jnp.pad(halves, ((0, 0), (0, 0), (0, missing))).reshape(count, 1, -1)
  return matrices, [scale, scale, down_scale.reshape(count, 1, depth)]


def _weight_specs(depth, tile, tiles):
  def columns(offset):
    def index(*step):
      expert, f = tile_at(*step)
      return expert, 0, f + offset

    return pl.BlockSpec((None, depth, tile), index)

  return columns(0), columns(tiles), pl.BlockSpec((None, tile, depth), lambda *s: (*tile_at(*s), 0))


def _scale_specs(depth, tile, tiles):
  gate, up, _ = _weight_specs(1, tile, tiles)
  return gate, up, pl.BlockSpec((None, 1, depth), lambda *s: (tile_at(*s)[0], 0, 0))


def _kernel(schedule, *refs, dtype, rows, tiles, gathered, scaled):
  if gathered:
    x, *refs, out, own, total = refs
  else:
    x, experts, weights, *refs, out, total = refs
  gate, up, down = refs[:3]
  gate_scale, up_scale, down_scale = refs[3:] if scaled else (None, None, None)
  half, i, f = (pl.program_id(axis) for axis in range(3))
  expert, live = tile_at(half, i, f, schedule)[0], i < schedule.count[half]
  start, size = schedule.start[expert], schedule.size[expert]

  @pl.when((i == 0) & (f == 0))
  def _():
    out[...] = jnp.zeros_like(out)

  if gathered:

    @pl.when(live & (f == 0))
    def _():
      @pl.loop(0, size)
      def _(row):
        own[pl.ds(row, 1)] = x[pl.ds(schedule.token[start + row], 1)]

  def multiply(block, source):
    part = _swiglu(source[block].astype(dtype), gate, up, down, gate_scale, up_scale)
    total[block] = jnp.where(f == 0, part, total[block] + part)

  @pl.when(live)
  def _():
    if not gathered:
      multiply(pl.ds(0, rows), x)
    else:

      @pl.loop(0, pl.cdiv(size, rows))
      def _(block):
        multiply(pl.ds(pl.multiple_of(block * rows, rows), rows), own)

  @pl.when(live & (f == tiles - 1))
  def _():
    scale = down_scale[...] if scaled else jnp.float32(1)
    if not gathered:
      chosen = experts[...] == expert
      weight = jnp.where(chosen, weights[...], 0).sum(1, keepdims=True)
      result = out[...] + weight * (total[...] * scale)
      out[...] = jnp.where(chosen.any(1, keepdims=True), result, out[...])
    else:

      @pl.loop(0, size)
      def _(row):
        token = pl.ds(schedule.token[start + row], 1)
        out[token] += schedule.weight[start + row] * (total[pl.ds(row, 1)] * scale)


def _swiglu(x, gate, up, down, gate_scale, up_scale):
  """[rows, D] times one tile of an expert, float32[rows, D]: a part of the expert's output."""
  gated, raised = _dot(x, gate[...]), _dot(x, up[...])
  if gate_scale is not None:
    gated, raised = gated * gate_scale[...], raised * up_scale[...]
  return _dot((jax.nn.silu(gated) * raised).astype(x.dtype), down[...])


def _dot(a, b):
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b.astype(a.dtype), precision=precision, preferred_element_type=jnp.float32)
