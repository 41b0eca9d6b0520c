"""What experts' weights in eight bits do to a model: logits, and the tokens that decoding would write.

  python -m experiments.quantize_weights --model=runs/tiny_text

Half of the tokens of each row are masked. `error` is the root mean square of the difference of the
logits at masked positions, over that of the logits (each position's mean taken off, which no
probability depends on); `flips`: masked positions whose most likely token is another; `sure flips`:
those among them to which the exact model gives a probability above 0.9, which `Threshold` writes at
once; `nll`: the change of the negative log-likelihood of the true tokens, in nats per masked token,
where there is text. bfloat16 is the whole model in bfloat16, for comparison.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import lladax
from lladax.models import Denoiser, ModelConfig, for_inference
from lladax.models.quantized import WEIGHTS

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
  """See above.

  Attributes:
    error, flips, sure_flips: shares; sure_flips of the positions that are sure.
    nll: in nats per masked token.
  """

  error: float
  flips: float
  sure_flips: float
  nll: float


ALL = ("bfloat16", *WEIGHTS)


def effects(
  config: ModelConfig, params, tokens, *, weights: tuple[str, ...] = ALL, seed: int = 0
) -> dict[str, Effect]:
  """By name of the weights, on half-masked int32[B, L] tokens."""
  masked = np.random.default_rng(seed).random(tokens.shape) < 0.5
  masked[:, 0] = True
  noisy = np.where(masked, config.mask_token_id, tokens).astype(np.int32)
  exact = logits_of(*for_inference(config, params), noisy)[masked]
  truth = np.asarray(tokens)[masked]
  found = {}
  for name in weights:
    if name == "bfloat16":
      rounded = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
      other = for_inference(rounded, params)
    else:
      other = for_inference(config, params, weights=name)
    found[name] = compare(exact, logits_of(*other, noisy)[masked], truth)
  return found


def logits_of(config: ModelConfig, params, tokens) -> np.ndarray:
  """float32[B, L, V] with MASK at -inf, as decoding sees them."""
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  logits = jax.jit(Denoiser(config))(params, tokens, jnp.asarray(positions), jnp.ones_like(tokens))
  return np.asarray(logits.at[..., config.mask_token_id].set(-jnp.inf))


def compare(exact: np.ndarray, other: np.ndarray, truth: np.ndarray) -> Effect:
  """Logits float32[M, V] of M positions, and the tokens int32[M] that stand there."""
  log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (exact, other))
  finite = np.isfinite(exact)
  centred = [
    np.where(finite, x - x.mean(1, where=finite, keepdims=True), 0) for x in (exact, other)
  ]
  flipped = exact.argmax(1) != other.argmax(1)
  sure = log_p.max(1) > np.log(0.9)
  rows = np.arange(len(truth))
  return Effect(
    error=float(np.sqrt(np.mean((centred[1] - centred[0]) ** 2) / np.mean(centred[0] ** 2))),
    flips=float(flipped.mean()),
    sure_flips=float(flipped[sure].mean()) if sure.any() else 0.0,
    nll=float(np.mean(log_p[rows, truth] - log_q[rows, truth])),
  )


def table(found: dict[str, Effect]) -> str:
  lines = [f"{'':10}{'error':>9}{'flips':>9}{'sure flips':>12}{'nll':>10}"]
  for name, effect in found.items():
    lines.append(
      f"{name:10}{effect.error:9.2%}{effect.flips:9.2%}{effect.sure_flips:12.2%}{effect.nll:10.4f}"
    )
  return "\n".join(lines)


def main(_):
  model = lladax.load(FLAGS.model, dtype="float32", progress=False)
  shape = FLAGS.rows, FLAGS.length
  if FLAGS.text is None:
    tokens = np.random.default_rng(0).integers(2, model.config.vocab_size, shape)
  else:
    with open(FLAGS.text, encoding="utf-8") as file:
      ids = model.tokenizer.encode(file.read())
    if len(ids) < FLAGS.rows * FLAGS.length:
      raise SystemExit(
        f"{FLAGS.text} has {len(ids)} tokens; {FLAGS.rows * FLAGS.length} are needed"
      )
    tokens = np.asarray(ids[: FLAGS.rows * FLAGS.length]).reshape(shape)
  print(table(effects(model.config, model.params, tokens.astype(np.int32))))


def define_flags():
  flags.DEFINE_string("model", None, "Whatever lladax.load takes.", required=True)
  flags.DEFINE_string("text", None, "A file of text to mask; random tokens if there is none.")
  flags.DEFINE_integer("rows", 64, "How many.", lower_bound=1)
  flags.DEFINE_integer("length", 128, "Tokens of a row.", lower_bound=2)


if __name__ == "__main__":
  define_flags()
  app.run(main)
