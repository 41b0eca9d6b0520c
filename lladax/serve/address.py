"""Where a server listens."""

from __future__ import annotations

import socket


def bind(host: str, port: int) -> socket.socket:
  """A socket with this address; it does not listen yet.

  Raises:
    OSError: naming the address, for one that cannot be had.
  """
  bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind((host, port))
  except OSError as error:
    raise OSError(f"cannot listen at {host}:{port}: {error.strerror}") from None
  return bound
