"""LLaDA-MoE in JAX: masked-diffusion language models with a mixture of experts.

model = lladax.load("runs/tiny_text")
print(model.generate("To be, or not to be"))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from lladax.loading import init, load
  from lladax.model import Model

__all__ = ["Model", "init", "load"]


def __getattr__(name):
  # On first use: a test of one small module should not import the whole house.
  if name in __all__:
    from lladax import loading

    return getattr(loading, name)
  raise AttributeError(f"module 'lladax' has no attribute {name!r}; it has {', '.join(__all__)}")
