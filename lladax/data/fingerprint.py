"""The text of a run as saved state, so that a run does not go on with other text."""

from __future__ import annotations

import zlib

import numpy as np

from lladax.config import ConfigError
from lladax.data.pipeline import Data


class Fingerprint:
  """Counts and a checksum of the tokens, to be saved with a checkpoint and compared on restore."""

  def __init__(self, data: Data):
    self._state = {
      "train_tokens": data.train_rows.num_tokens,
      "heldout_tokens": data.heldout_rows.num_tokens,
      "crc32": zlib.crc32(np.ascontiguousarray(data.train_rows.tokens)),
    }

  def get_state(self) -> dict[str, int]:
    return self._state

  def set_state(self, state: dict[str, int]):
    """Raises ConfigError if the state is of other text."""
    if state != self._state:
      raise ConfigError(
        f"the text or its tokenizer changed since the checkpoint was saved ({state} then, "
        f"{self._state} now); put the files back, or choose another workdir"
      )
