"""One line of the table between two namings of the same weights, read either way.

Import takes tensors to slices of the parameters, export takes the slices back; both are the same
einops pattern, so that they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import einops
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """Some tensors of a checkpoint and the parameters that they are.

  One visit of a row is one layer (and one expert): the tensors of that visit are joined along
  `join_axis`, rearranged by `pattern` and split along `split_axis` into one slice per parameter.
  A slice is what remains of a parameter when its leading axes are indexed: `param[layer, expert]`
  where the row has experts, `param[layer]` where it has layers only, else the parameter itself.

  Attributes:
    params: paths in the parameter tree, e.g. "layers/attention/query/kernel".
    tensors: names over there; `{n}` stands for the absolute number of the layer, `{e}` for the
      expert.
    pattern: einops, joined tensor -> joined slice, e.g. "(n h) d -> d n h".
    sizes: lengths of axes that the pattern cannot tell by itself.
    join_axis: the axis along which several tensors, equally long there, are joined.
    repeated: instead of being joined, the tensors are one and the same (a tied output head that a
      checkpoint holds all the same). Import checks that, export writes each.
    split: with several parameters, their lengths along `split_axis` of the slice.
    split_axis: see `split`.
    layers: absolute numbers of the layers; the index in our stack counts from `layers.start`.
      None: the names have no layer.
    experts: the number of experts that the names count; None: they count none.
    dtype: dtype of the tensors where it is not that of the checkpoint.
  """

  params: tuple[str, ...]
  tensors: tuple[str, ...]
  pattern: str
  sizes: tuple[tuple[str, int], ...] = ()
  join_axis: int = 0
  repeated: bool = False
  split: tuple[int, ...] = ()
  split_axis: int = 0
  layers: range | None = None
  experts: int | None = None
  dtype: str | None = None

  @property
  def leading(self) -> int:
    """How many leading axes of a parameter one visit indexes: 0, 1 (layer) or 2 (and expert)."""
    return (self.layers is not None) + (self.experts is not None)

  def names(self) -> Iterator[tuple[int | None, int | None, tuple[str, ...]]]:
    """Every visit: index in our stack of layers, expert, names of the tensors."""
    for n in [None] if self.layers is None else self.layers:
      layer = None if n is None else n - self.layers.start
      for e in [None] if self.experts is None else range(self.experts):
        yield layer, e, tuple(name.format(n=n, e=e) for name in self.tensors)

  def to_params(self, tensors: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The slices of the parameters (same order) that the tensors of one visit hold.

    Raises:
      ValueError: if repeated tensors differ.
    """
    joined = tensors[0] if self.repeated else _join(tensors, self.join_axis)
    for name, tensor in zip(self.tensors[1:], tensors[1:], strict=True):
      if self.repeated and not _same(tensors[0], tensor):
        raise ValueError(
          f"{name} differs from {self.tensors[0]}, but the config ties the two: tie_word_embeddings"
          " is true. Correct the config, or remove the tensor that does not count"
        )
    slices = einops.rearrange(joined, self.pattern, **dict(self.sizes))
    return tuple(_split(slices, self.split, self.split_axis)) if self.split else (slices,)

  def to_tensors(self, slices: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The inverse of `to_params`."""
    left, right = self.pattern.split("->")
    joined = _join(slices, self.split_axis)
    joined = einops.rearrange(joined, f"{right} -> {left}", **dict(self.sizes))
    if self.repeated:
      return (joined,) * len(self.tensors)
    length, rest = divmod(joined.shape[self.join_axis], len(self.tensors))
    if rest:
      raise ValueError(
        f"{' + '.join(self.tensors)}: {len(self.tensors)} equal parts of axis {self.join_axis} "
        f"of {joined.shape} expected"
      )
    return tuple(_split(joined, (length,) * len(self.tensors), self.join_axis))

  def tensor_shapes(self, param_shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple, ...]:
    """Shape of each of `tensors`, from the shapes of whole parameters by path. Allocates nothing.

    Args:
      param_shapes: of all parameters, or at least of `params`.
    """
    slices = [
      jax.ShapeDtypeStruct(param_shapes[path][self.leading :], jnp.float32) for path in self.params
    ]
    return tuple(x.shape for x in jax.eval_shape(self.to_tensors, slices))


def _join(parts, axis):
  if len(parts) == 1:
    return parts[0]
  library = np if isinstance(parts[0], np.ndarray) else jnp
  return library.concatenate(parts, axis=axis)


def _split(x, lengths, axis):
  start = 0
  for length in lengths:
    index = (slice(None),) * axis + (slice(start, start + length),)
    yield x[index]
    start += length


def _same(a, b) -> bool:
  """Bit for bit, so that a NaN equals itself."""
  same_kind = a.dtype == b.dtype and a.shape == b.shape
  return same_kind and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
