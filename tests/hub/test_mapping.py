"""A row's two directions undo each other; joined, split and repeated tensors lie where they should."""

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from lladax.hub.mapping import Row

QKV = Row(
  params=("query", "key", "value"),
  tensors=("layer.{n}.qkv",),
  pattern="(n h) d -> d n h",
  sizes=(("h", 2),),
  split=(4, 1, 1),
  split_axis=1,
  layers=range(1, 3),
)
GATE_UP = Row(
  params=("gate_up",),
  tensors=("layer.{n}.expert.{e}.gate", "layer.{n}.expert.{e}.up"),
  pattern="f d -> d f",
  layers=range(1, 3),
  experts=2,
)
STACKED = Row(
  params=("gate_up",),
  tensors=("layer.{n}.gate", "layer.{n}.up"),
  pattern="e f d -> e d f",
  join_axis=1,
  layers=range(3),
)
TIED = Row(params=("embedding",), tensors=("in", "out"), pattern="v d -> v d", repeated=True)
PARAM_SHAPES = {
  QKV: {"query": (2, 3, 4, 2), "key": (2, 3, 1, 2), "value": (2, 3, 1, 2)},
  GATE_UP: {"gate_up": (2, 2, 3, 10)},
  STACKED: {"gate_up": (3, 2, 3, 10)},
  TIED: {"embedding": (7, 3)},
}
TENSOR_SHAPES = {
  QKV: ((12, 3),),
  GATE_UP: ((5, 3), (5, 3)),
  STACKED: ((2, 5, 3), (2, 5, 3)),
  TIED: ((7, 3), (7, 3)),
}
ROWS = pytest.mark.parametrize("row", PARAM_SHAPES, ids=["qkv", "gate_up", "stacked", "tied"])


@ROWS
def test_shapes(row):
  assert row.tensor_shapes(PARAM_SHAPES[row]) == TENSOR_SHAPES[row]


def test_names_count_layers_absolutely_and_our_stack_from_zero():
  assert list(QKV.names()) == [(0, None, ("layer.1.qkv",)), (1, None, ("layer.2.qkv",))]
  visits = list(GATE_UP.names())
  assert visits[3] == (1, 1, ("layer.2.expert.1.gate", "layer.2.expert.1.up"))
  assert [visit[:2] for visit in visits] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  assert list(TIED.names()) == [(None, None, ("in", "out"))]
  assert [row.leading for row in (TIED, QKV, GATE_UP)] == [0, 1, 2]


@ROWS
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back_are_the_same_bytes(row, dtype):
  @hypothesis.settings(max_examples=20, deadline=None)
  @hypothesis.given(st.randoms(use_true_random=False))
  def law(random):
    bits = np.dtype(dtype).itemsize

    def array(shape):  # any bytes: NaNs with payloads and negative zeros, too
      return np.frombuffer(random.randbytes(bits * int(np.prod(shape))), dtype).reshape(shape)

    tensors = [array(shape) for shape in TENSOR_SHAPES[row]]
    if row.repeated:
      tensors = [tensors[0]] * len(tensors)
    slices = row.to_params(tensors)
    for path, part in zip(row.params, slices, strict=True):
      assert part.shape == PARAM_SHAPES[row][path][row.leading :]
    back = row.to_tensors(slices)
    assert [x.tobytes() for x in back] == [x.tobytes() for x in tensors]
    assert all(x.dtype == dtype for x in (*slices, *back))

  law()


def test_heads_lie_one_after_the_other():
  fused = np.arange(36).reshape(12, 3)
  query, key, value = QKV.to_params([fused])
  np.testing.assert_array_equal(query[:, 2, 1], fused[5])
  np.testing.assert_array_equal(key[:, 0, 1], fused[9])
  np.testing.assert_array_equal(value[:, 0, 0], fused[10])


def test_gate_comes_first():
  gate, up = np.zeros((5, 3)), np.ones((5, 3))
  (joined,) = GATE_UP.to_params([gate, up])
  np.testing.assert_array_equal(joined[:, :5], 0)
  np.testing.assert_array_equal(joined[:, 5:], 1)
  (stacked,) = STACKED.to_params([np.stack([gate] * 2), np.stack([up] * 2)])
  np.testing.assert_array_equal(stacked[1], joined)


def test_a_tied_tensor_that_differs_is_refused():
  one = np.zeros((7, 3), np.float32)
  TIED.to_params([one, one.copy()])
  with pytest.raises(ValueError, match="out differs from in.* tie_word_embeddings"):
    TIED.to_params([one, one + 1])


def test_parts_that_are_not_equal_are_refused():
  with pytest.raises(ValueError, match="2 equal parts of axis 0"):
    GATE_UP.to_tensors([np.zeros((3, 9))])
