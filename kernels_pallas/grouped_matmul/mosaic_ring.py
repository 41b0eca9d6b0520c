"""What Hopper kernels share: a ring of shared memory between the copying and multiplying warpgroups.

Three warpgroups per multiprocessor: one copies tiles of both factors into the ring, two multiply,
each its half of a tile's rows, and store. Blocks are persistent, so that the copies of the next
tile run while this one is stored. Hopper's own means: the tensor memory accelerator and wgmma.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gpu, op

SHARED_MEMORY = 227 << 10  # bytes of one block on Hopper
SWIZZLE = 128  # bytes: a row of the smallest tile that wgmma reads and the copy engine writes
WARPGROUPS = 2  # that multiply; the copying one comes after them


def run(grid, copy_tile, multiply_tile, full, free):
  """Every block walks its share of the grid, one warpgroup copying ahead of those that multiply."""
  warpgroup = lax.axis_index("warpgroup")

  def walk(body):
    def step(info, carry):
      return body(info, carry)

    return plgpu.nd_loop(grid, collective_axes="block", init_carry=jnp.int32(0))(step)

  @pl.when(warpgroup == WARPGROUPS)
  def copies():
    plgpu.set_max_registers(40, action="decrease")
    done = walk(copy_tile)
    stages = free.shape[0]

    @pl.loop(jnp.maximum(done - stages, 0), done)
    def wait_for_the_last(step):
      plgpu.barrier_wait(free.at[lax.rem(step, stages)])

  @pl.when(warpgroup < WARPGROUPS)
  def multiplies():
    plgpu.set_max_registers(232, action="increase")
    walk(multiply_tile)
    plgpu.wait_smem_to_gmem(0)


def produce(full, free, done, steps, copy):
  """Issues the copies of a tile's steps as stages fall free; `done` steps were before these."""
  stages = free.shape[0]

  def step(i, done):
    slot = lax.rem(done, stages)
    pl.when(done >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    copy(i, slot, full.at[slot])
    return done + 1

  return lax.fori_loop(0, steps, step, done)


def consume(full, free, done, steps, multiply, *, shapes):
  """Sums a tile's steps as they arrive: -> steps done, and float32 sums of `shapes`."""
  stages = free.shape[0]

  def scope(*sums):
    def step(i, done):
      slot = lax.rem(done, stages)
      plgpu.barrier_wait(full.at[slot])
      multiply(i, slot, *sums)
      # This step's products may still run; those of the step before are done with their stage.
      plgpu.wgmma_wait(len(sums))
      before = lax.rem(done + stages - 1, stages)
      pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[before]))
      return done + 1

    after = lax.fori_loop(0, steps, step, done)
    values = [total[...] for total in sums]  # waits for the products
    last = lax.rem(after + stages - 1, stages)
    pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[last]))
    return after, *values

  return pl.run_scoped(scope, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])


def keep_rows(ref, begin, stop):
  """Zeroes the rows of a tile outside [begin, stop): they are other groups', or poisoned."""
  row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, ref.shape, 0), plgpu.Layout.WGMMA)
  ref[...] = jnp.where((row >= begin) & (row < stop), ref[...], jnp.zeros((), ref.dtype))


def store(out, staging, value, row, column, live=None):
  """`value` to out[row:, column:] by way of shared memory; of its rows all, or [begin, end).

  The copy engine's sizes are static, so a number of rows is stored as its powers of two. What lies
  beyond the output's end is not stored.
  """
  slots, rows, chunk = staging.shape
  for i in range(value.shape[1] // chunk):
    # The interpreter counts copies where the hardware counts committed groups.
    plgpu.wait_smem_to_gmem(0 if op.interpreted() else slots - 1, wait_read_only=True)
    slot, columns = staging.at[i % slots], pl.ds(column + i * chunk, chunk)
    slot[...] = value[:, i * chunk : (i + 1) * chunk].astype(out.dtype)
    plgpu.commit_smem()
    if live is None:
      plgpu.copy_smem_to_gmem(slot, out.at[pl.ds(row, rows), columns], commit_group=False)
    else:
      at, size = live[0], 1 << (rows.bit_length() - 1)
      while size:
        source, target = slot.at[pl.ds(at, size)], out.at[pl.ds(row + at, size), columns]
        copy = functools.partial(plgpu.copy_smem_to_gmem, source, target, commit_group=False)
        taken = (live[1] - live[0]) & size
        pl.when(taken != 0)(copy)
        at, size = at + taken, size // 2
    plgpu.commit_smem_to_gmem_group()


def kernel(body, outputs, scratch, name):
  """A function of the operands, that starts `body` on every multiprocessor."""
  blocks = 2 if op.interpreted() else gpu.core_count()  # two suffice to see how they share work
  call = plgpu.kernel(
    body,
    out_type=outputs,
    scratch_types=scratch,
    grid=(blocks,),
    grid_names=("block",),
    num_threads=WARPGROUPS + 1,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    interpret=gpu.mosaic_interpreter(),
  )

  def for_target(*args):
    with op.for_target():
      return call(*args)

  return for_target


def shared(shape, dtype, rows=8):
  """Shared memory in tiles of rows x 128 bytes, swizzled, as wgmma and the copy engine like it."""
  tiles = plgpu.TilingTransform((rows, SWIZZLE // jnp.dtype(dtype).itemsize))
  return plgpu.SMEM(shape, dtype, transforms=(tiles, plgpu.SwizzleTransform(SWIZZLE)))


def staging(rows, dtype):
  """Two chunks of a tile's columns per warpgroup, of which any rows can be stored."""
  return shared((WARPGROUPS, 2, rows, SWIZZLE // jnp.dtype(dtype).itemsize), dtype, rows=1)


def barriers(stages, copies):
  """Of each stage: all of its copies have arrived; all warpgroups have multiplied it."""
  return (
    plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
  )


def meeting():
  return plgpu.Barrier(num_arrivals=WARPGROUPS)
