"""Files that grow while a run goes on, where its workdir is a bucket, in which nothing can be appended to."""

from __future__ import annotations

import hashlib
import os
import pathlib

from etils import epath

from lladax.data.tokenizer import cache_dir


class Spool:
  """A local folder for such files: the workdir itself, or a stand-in that is copied there.

  Attributes:
    local: where to write.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._workdir = epath.Path(workdir)
    self._stands_in = is_remote(workdir)
    self.local = pathlib.Path(workdir)
    self._pushed: dict[pathlib.Path, int] = {}
    if self._stands_in:
      name = hashlib.sha256(os.fspath(self._workdir).encode()).hexdigest()[:16]
      self.local = cache_dir() / "runs" / name

  def fetch(self, pattern: str):
    """Makes the local files those of the workdir: another machine may have gone on."""
    if self._stands_in:
      self.local.mkdir(parents=True, exist_ok=True)
      for path in self.local.glob(pattern):
        path.unlink()
      for path in self._workdir.glob(pattern):
        (self.local / path.name).write_bytes(path.read_bytes())

  def push(self):
    """Copies what has grown to the workdir."""
    if not self._stands_in:
      return
    for path in sorted(self.local.rglob("*")):
      if path.is_file() and self._pushed.get(path) != path.stat().st_size:
        self._pushed[path] = path.stat().st_size
        target = self._workdir / path.relative_to(self.local).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is of an object store, such as gs://bucket/run."""
  return "://" in os.fspath(path)
