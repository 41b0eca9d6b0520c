"""The torch side of `benchmark_kernels`: the same operations, imported only when they are made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def device():
  import torch

  return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def maker(make: Callable[[int], list]) -> Callable[[int], list]:
  """Operands as torch tensors with the numbers of JAX's."""
  import torch

  def made(turn):
    arrays = make(turn)
    tensors = [torch.tensor(np.asarray(x, np.float32), device=device()) for x in arrays]
    return [x.to(getattr(torch, str(arrays[0].dtype))) for x in tensors]

  return made


def wait(_):
  import torch

  if torch.cuda.is_available():
    torch.cuda.synchronize()


def fetch(result):
  """Tensors as NumPy arrays."""
  return result.float().cpu().numpy()


def grouped_matmul(key: str, sizes: np.ndarray) -> Callable:
  """torch's own grouped product, for "fwd", "dlhs" or "drhs"."""
  import torch

  public = getattr(torch.nn.functional, "grouped_mm", None)
  product = public or torch._grouped_mm
  ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device=device())

  def run(a, b):
    if key == "dlhs":
      return product(a, b.transpose(1, 2), offs=ends)
    return product(a.t() if key == "drhs" else a, b, offs=ends)

  return run


def dispatch(index: np.ndarray) -> Callable:
  import torch

  index = torch.tensor(index, device=device())
  return lambda x: x.index_select(0, index)


def attention(query, key, value, grad):
  """[B, L, N, H] each, as JAX's."""
  import torch

  del grad
  heads_first = [x.transpose(1, 2) for x in (query, key, value)]
  return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
