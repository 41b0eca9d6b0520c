"""A finished result made by hand, for the tests of what shows one."""

import numpy as np

from lladax.infer.generate import GenerateResult

MASK = 256


def decode(ids) -> str:
  return bytes(ids).decode("utf-8", errors="replace")


def result_of(text: str, when: list[int]) -> GenerateResult:
  """A finished canvas of bytes behind two columns of padding; `when` as in `revealed_at`."""
  ids = list(text.encode())
  assert len(ids) == len(when)
  row = np.array([[0, 0, *ids]], np.int32)
  return GenerateResult(
    tokens=row,
    is_text=np.array([[False, False] + [True] * len(ids)]),
    revealed_at=np.array([[-1, -1, *when]], np.int32),
    confidence=np.zeros(row.shape, np.float32),
    nfe=np.array([max(when, default=-1) + 1]),
    answers=[ids],
    mask_id=MASK,
  )
