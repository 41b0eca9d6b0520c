"""Every implementation of attention against softmax attention written out in float64 NumPy."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import op
from kernels_pallas.attention import IMPLEMENTATIONS, api, attention, chunked, row_blocks, splash

# cuDNN runs on NVIDIA GPUs alone; what goes into it is tested below.
RUNNABLE = [name for name in IMPLEMENTATIONS if name != "cudnn"]
H = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Shapes and masks; heads are (query heads, key heads)."""

  batch: int = 4
  queries: int = 12
  keys: int = 12
  heads: tuple[int, int] = (4, 2)
  packed: bool = False
  block_length: int | None = None
  offset: int | tuple[int, ...] = 0  # or one for each row

  def operands(self, dtype=jnp.float32):
    """query, key, value and the gradient of the output."""
    shapes = [(n, h) for n, h in zip(self.lengths, (0, 1, 1, 0), strict=True)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [
      jax.random.normal(key, (self.batch, length, self.heads[h], H), dtype)
      for key, (length, h) in zip(keys, shapes, strict=True)
    ]

  @property
  def lengths(self):
    return self.queries, self.keys, self.keys, self.queries

  def segments(self):
    """Ids of queries and of keys: documents of random lengths, then padding (0)."""
    if not self.packed:
      return None, None
    random = np.random.default_rng(1)

    def row(length):
      lengths = random.integers(1, max(2, length // 2), size=9)
      ids = np.repeat([1, 2, 3, 4, 0, 0, 0, 0, 0], lengths)[:length]
      return np.pad(ids, (0, length - len(ids)))

    queries = np.stack([row(self.queries) for _ in range(self.batch)]).astype(np.int32)
    if self.keys == self.queries:
      return queries, None
    # Other documents than the queries': some queries find no key at all.
    keys = np.stack([row(self.keys) for _ in range(self.batch)]).astype(np.int32)
    return queries, np.where(keys == 2, 7, keys)

  def allowed(self):
    """bool[B, L, S]."""
    ids, key_ids = self.segments()
    key_ids = ids if key_ids is None else key_ids
    mask = np.ones((self.batch, self.queries, self.keys), bool)
    if ids is not None:
      mask &= ids[:, :, None] == key_ids[:, None]
    if self.block_length is not None:
      position = np.arange(self.queries) + np.reshape(self.offset, (-1, 1))  # [B or 1, L]
      block = position // self.block_length
      mask &= block[:, :, None] >= np.arange(self.keys) // self.block_length
    return mask


CASES = {
  "full": Case(heads=(4, 4)),
  "packed": Case(packed=True),
  "block_causal": Case(block_length=5),  # 5 does not divide 12
  "packed_block_causal": Case(packed=True, block_length=4, batch=6),
  "other_keys": Case(queries=7, keys=20, packed=True),
  "later_queries": Case(queries=7, keys=20, packed=True, block_length=4, offset=9),
  "an_offset_per_row": Case(queries=8, keys=20, packed=True, block_length=4, offset=(0, 4, 9, 12)),
}


def softmax_attention(case, query, key, value, grad):
  """Output and gradients of query, key and value, in float64; nothing where there is no key."""
  query, key, value, grad = (np.asarray(x, np.float64) for x in (query, key, value, grad))
  group, allowed = case.heads[0] // case.heads[1], case.allowed()
  out, dquery, dkey, dvalue = (np.zeros_like(x) for x in (query, query, key, value))
  for b in range(case.batch):
    seeing = allowed[b].any(1)
    for n in range(case.heads[0]):
      q, k, v, g = query[b, :, n], key[b, :, n // group], value[b, :, n // group], grad[b, :, n]
      scores = np.where(allowed[b], q @ k.T / np.sqrt(H), -1e300)
      p = np.exp(scores - scores.max(1, keepdims=True)) * allowed[b]
      p[seeing] /= p[seeing].sum(1, keepdims=True)
      out[b, :, n] = p @ v
      dp = g @ v.T
      ds = p * (dp - (p * dp).sum(1, keepdims=True)) / np.sqrt(H)
      dquery[b, :, n] = ds @ k
      dkey[b, :, n // group] += ds.T @ q
      dvalue[b, :, n // group] += p.T @ g
  return out, dquery, dkey, dvalue


def value_and_gradients(implementation, case, *operands, offset=None):
  ids, key_ids = case.segments()

  def run(query, key, value, grad, offset):
    def attend(*args):
      return attention(
        *args,
        ids,
        key_segment_ids=key_ids,
        block_length=case.block_length,
        query_offset=offset,
        implementation=implementation,
      )

    out, vjp = jax.vjp(attend, query, key, value)
    return out, *vjp(grad)

  with op.interpret() if implementation == "splash" else contextlib.nullcontext():
    if offset is not None:  # traced
      return jax.jit(run)(*operands, offset)
    offset = case.offset if isinstance(case.offset, int) else np.array(case.offset)
    return jax.jit(lambda *args: run(*args, offset))(*operands)


def assert_close(got, want, tolerance=1e-5):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# Interpreted kernels are slow to compile: theirs are the cases that hold the others.
@pytest.mark.parametrize(
  "implementation, case",
  [(name, case) for name in RUNNABLE if name != "splash" for case in CASES]
  + [("splash", case) for case in ("full", "packed_block_causal", "later_queries")],
)
def test_values_and_gradients(implementation, case):
  case = CASES[case]
  args = case.operands()
  want = softmax_attention(case, *args)
  assert_close(value_and_gradients(implementation, case, *args), want)
  if case.keys != case.queries:  # the case is what it says: some have no key, exactly nothing there
    assert 0 < (want[0] == 0).all((2, 3)).sum() < case.batch * case.queries


# Rows that fit: 4 (but 4 does not divide 6: 3), 1, and less than one (1 all the same).
@pytest.mark.parametrize("scores", [4 * 4 * 12 * 12, 4 * 12 * 12, 1])
def test_row_blocks_of_batches_that_do_not_fit_one(monkeypatch, scores):
  case = CASES["packed_block_causal"]
  args = case.operands()
  monkeypatch.setattr(row_blocks, "SCORES_PER_BLOCK", scores)
  assert_close(value_and_gradients("row_blocks", case, *args), softmax_attention(case, *args))


# Queries at a time: 12, 6, 5 (not dividing 12) and 1; for rows one by one and all together.
@pytest.mark.parametrize("case", ["packed_block_causal", "later_queries", "an_offset_per_row"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("queries", [12, 6, 5, 1])
def test_row_blocks_of_long_rows(monkeypatch, case, rows, queries):
  case = CASES[case]
  args = case.operands()
  scores = case.heads[0] * case.keys
  monkeypatch.setattr(row_blocks, "SCORES_PER_BLOCK", rows * scores * case.queries)
  monkeypatch.setattr(row_blocks, "SCORES_AT_ONCE", rows * scores * queries)
  assert_close(value_and_gradients("row_blocks", case, *args), softmax_attention(case, *args))


# Queries per chunk: 4 (dividing 12), and 8 (not dividing it).
@pytest.mark.parametrize("case", ["packed_block_causal", "later_queries", "an_offset_per_row"])
@pytest.mark.parametrize("size", [4, 8])
def test_chunks_of_queries(monkeypatch, case, size):
  case = CASES[case]
  args = case.operands()
  monkeypatch.setattr(chunked, "LEAST_QUERIES", size)
  monkeypatch.setattr(chunked, "SCORES_PER_CHUNK", 1)
  assert_close(value_and_gradients("chunked", case, *args), softmax_attention(case, *args))


# Lengths are no multiples of a block, some blocks of scores are beyond every limit, and the last
# limit is beyond the last key.
@pytest.mark.parametrize(
  "case",
  [
    Case(batch=2, queries=300, keys=300, heads=(2, 1), packed=True),
    Case(batch=1, queries=260, keys=400, heads=(2, 2), block_length=32, offset=140),
  ],
)
def test_splash_of_many_blocks(monkeypatch, case):
  monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)
  args = case.operands()
  got = value_and_gradients("splash", case, *args, offset=case.offset)
  assert_close(got, softmax_attention(case, *args))


@pytest.mark.parametrize("implementation", ["row_blocks", "chunked", "reference"])
def test_blocks_of_one_are_causal(implementation):
  query, key, value, _ = Case(heads=(4, 4)).operands()

  @jax.jit
  def run(*args):
    return attention(*args, block_length=1, implementation=implementation)

  before = run(query, key, value)
  np.testing.assert_allclose(before[:, 0], value[:, 0], rtol=1e-6)  # sees itself alone
  key, value = key.at[:, 7:].add(3.0), value.at[:, 7:].add(3.0)
  after = run(query, key, value)
  np.testing.assert_array_equal(after[:, :7], before[:, :7])
  assert (jnp.abs(after[:, 7:] - before[:, 7:]).max((0, 2, 3)) > 0.1).all()


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_scores_far_apart_do_not_overflow(implementation):
  case = CASES["other_keys"]
  query, *rest = case.operands()
  got = value_and_gradients(implementation, case, 1e3 * query, *rest)
  assert_close(got, softmax_attention(case, 1e3 * query, *rest), 2e-2)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_bfloat16_stays_near_float64(implementation):
  case = CASES["packed"]
  args = case.operands(jnp.bfloat16)
  got = value_and_gradients(implementation, case, *args)
  assert {x.dtype.name for x in got} == {"bfloat16"}
  got = [np.asarray(x, np.float64) for x in got]
  assert_close(got, softmax_attention(case, *args), 2**-6)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
  """JAX's other implementation in place of cuDNN; yields the masks and flags that were given."""
  real, given = jax.nn.dot_product_attention, []

  def stand_in(query, key, value, *, mask=None, is_causal, implementation):
    assert implementation == "cudnn"
    given.append((None if mask is None else mask.shape, is_causal))
    return real(query, key, value, mask=mask, is_causal=is_causal, implementation="xla")

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  monkeypatch.setattr(api.cudnn, "_missing", lambda: None)
  monkeypatch.setattr(op, "only_on", lambda platform, name, function, *args: function(*args))
  return given


@pytest.mark.parametrize(
  "case, rows, given",
  [
    (Case(heads=(4, 4)), 4, (None, False)),
    (Case(block_length=1), 4, (None, True)),
    (CASES["packed"], 4, ((4, 1, 12, 12), False)),
    (CASES["packed_block_causal"], 4, ((3, 1, 12, 12), False)),  # of 6 rows
    (dataclasses.replace(CASES["later_queries"], queries=8), 1, ((1, 1, 8, 20), False)),
    (CASES["an_offset_per_row"], 2, ((2, 1, 8, 20), False)),
  ],
)
def test_what_cudnn_is_given(monkeypatch, cudnn_by_xla, case, rows, given):
  monkeypatch.setattr(api.cudnn, "BIAS_BYTES", rows * 2 * case.queries * case.keys)
  args = case.operands(jnp.bfloat16)
  got = [np.asarray(x, np.float64) for x in value_and_gradients("cudnn", case, *args)]
  assert_close(got, softmax_attention(case, *args), 2**-5)
  assert set(cudnn_by_xla) == {given}


@pytest.mark.parametrize(
  "case, dtype, why",
  [
    (Case(), jnp.float32, "bfloat16 or float16, not float32"),
    (dataclasses.replace(CASES["other_keys"], queries=7), jnp.bfloat16, "even lengths, not 7"),
    (Case(queries=1 << 15, keys=1 << 15, packed=True, batch=1), jnp.bfloat16, "2147483648 bytes"),
  ],
)
def test_what_cudnn_refuses(cudnn_by_xla, case, dtype, why):
  ids, key_ids = case.segments()
  shapes = [
    jax.ShapeDtypeStruct((case.batch, length, case.heads[0], H), dtype)
    for length in case.lengths[:3]
  ]
  with pytest.raises(ValueError, match=why):
    jax.eval_shape(
      lambda *args: attention(*args, ids, key_segment_ids=key_ids, implementation="cudnn"), *shapes
    )


def test_without_cudnn_its_name_is_an_error_and_others_are_chosen():
  args = Case().operands(jnp.bfloat16)[:3]
  with pytest.raises(ValueError, match="'cudnn' cannot run here: cuDNN is not detected"):
    attention(*args, implementation="cudnn")
  with op.target("NVIDIA H100 80GB HBM3"):
    lowered = (
      jax.jit(lambda *args: attention(*args)).trace(*args).lower(lowering_platforms=("cuda",))
    )
  assert "custom_call" not in lowered.as_text()


def test_a_kernel_for_another_platform_is_an_error_when_lowered():
  args = Case().operands()[:3]
  with pytest.raises(ValueError, match="'splash' runs on tpu only"):
    jax.jit(lambda *args: attention(*args, implementation="splash")).lower(*args)
  with pytest.raises(ValueError, match="'splash' cannot run here: .*float16"):
    attention(*(x.astype(jnp.float16) for x in args), implementation="splash")
  with pytest.raises(ValueError, match="'splash' cannot run here: .*offset per row"):
    offsets = jnp.arange(4)
    attention(*args, block_length=4, query_offset=offsets, implementation="splash")


def test_a_cpu_is_given_row_blocks():
  args = CASES["packed"].operands()[:3]

  def operations(implementation):
    run = jax.jit(lambda *args: attention(*args, implementation=implementation))
    return run.lower(*args).as_text()

  assert operations(None) == operations("row_blocks") != operations("chunked")


@pytest.mark.parametrize("packed", [False, True])
def test_no_row_holds_all_of_its_scores(packed):
  shape = (2, 4096, 4, 8)
  args = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
  ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32) if packed else None

  def loss(query, key, value, ids):
    return attention(query, key, value, ids).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args, ids).compile()
  scores = 4 * 4 * 4096 * 4096  # bytes, of one row of the batch
  assert compiled.memory_analysis().temp_size_in_bytes < scores


@pytest.mark.parametrize("implementation", [None, "chunked"])
def test_a_sequence_on_four_devices_whose_keys_are_gathered(implementation):
  case = Case(batch=2, queries=32, keys=32, packed=True, block_length=4)
  query, key, value, grad = case.operands()
  ids, _ = case.segments()
  mesh = jax.make_mesh((2, 4), ("batch", "length"), axis_types=(AxisType.Auto,) * 2)

  def local(query, key, value, ids):
    key, value, key_ids = (
      jax.lax.all_gather(x, "length", axis=1, tiled=True) for x in (key, value, ids)
    )
    offset = jax.lax.axis_index("length") * query.shape[1]
    return attention(
      query,
      key,
      value,
      ids,
      key_segment_ids=key_ids,
      block_length=4,
      query_offset=offset,
      implementation=implementation,
    )

  split = PartitionSpec("batch", "length")
  run = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=True)

  @jax.jit
  def both(*args):
    out, vjp = jax.vjp(lambda *args: run(*args, ids), *args)
    return out, *vjp(grad)

  assert_close(both(query, key, value), softmax_attention(case, query, key, value, grad))


@pytest.mark.parametrize(
  "query, key, value, segment_ids",
  [
    ((2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 2, 8), None),
    ((2, 6, 4, 8), (2, 6, 3, 8), (2, 6, 3, 8), None),  # 3 does not divide 4
    ((2, 6, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8), (2, 6)),  # which segments have the 5 keys?
    ((2, 6, 4, 8), (1, 6, 4, 8), (1, 6, 4, 8), None),
    ((2, 6, 4, 8), (2, 6, 4, 6), (2, 6, 4, 6), None),
    ((6, 4, 8), (6, 4, 8), (6, 4, 8), None),
    ((2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 4, 8), (1, 6)),
    ((2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 4, 8), (2, 5)),
  ],
)
def test_shapes_that_do_not_fit(query, key, value, segment_ids):
  ids = None if segment_ids is None else jnp.ones(segment_ids, jnp.int32)
  with pytest.raises(ValueError, match="expected") as error:
    attention(jnp.zeros(query), jnp.zeros(key), jnp.zeros(value), ids)
  assert str(query if ids is None else query[1]) in str(error.value)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"implementation": "flash"}, "'flash'.*row_blocks"),
    ({"block_length": 0}, "block_length of at least 1, got 0"),
    ({"query_offset": -1}, "query_offset of at least 0, got -1"),
    ({"query_offset": jnp.zeros(3, jnp.int32)}, r"one for each of 4 rows, got \(3,\)"),
    ({"key_segment_ids": jnp.ones((4, 12), jnp.int32)}, "segment_ids of the queries"),
  ],
)
def test_options_that_do_not_fit(options, message):
  with pytest.raises(ValueError, match=message):
    attention(*Case().operands()[:3], **options)
