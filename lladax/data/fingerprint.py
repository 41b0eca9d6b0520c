"""The text of a run as saved state, so that a run does not go on with other text."""

from __future__ import annotations

from typing import Any

from lladax.config import ConfigError
from lladax.data.pipeline import Data


class Fingerprint:
  """What tells the text of a run, to be saved with a checkpoint and compared on restore."""

  def __init__(self, data: Data):
    self._state = data.fingerprint()

  def get_state(self) -> dict[str, Any]:
    return self._state

  def set_state(self, state: dict[str, Any]):
    """Raises ConfigError if the state is of other text."""
    if state != self._state:
      raise ConfigError(
        f"the text or its tokenizer changed since the checkpoint was saved ({state} then, "
        f"{self._state} now); put the files back, or choose another workdir"
      )
