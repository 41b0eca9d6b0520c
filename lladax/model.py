"""The facade for people: a config, parameters and a tokenizer, and what one does with them.

Nothing is computed here: each method checks its input, turns text into ids and calls the pure
functions of `lladax.models`, `lladax.diffusion` and `lladax.infer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lladax.data import Tokenizer, encode_with_masks
from lladax.diffusion import log_likelihood_bound, repeat_rows
from lladax.hub import Chat, Source, save_folder
from lladax.infer import BlockCausal, GenerateResult, SamplerConfig
from lladax.infer import generate as generate_ids
from lladax.infer import infill as infill_ids
from lladax.infer.engine import Engine
from lladax.models import Denoiser, ModelConfig, Transformer, bind_token_nll, for_inference
from lladax.sharding import use_mesh
from lladax.types import Batch, Logits

MASK_TEXT = "<|mask|>"


@dataclasses.dataclass(eq=False)
class Model:
  """A model ready for use.

  Attributes:
    config: the architecture.
    params: the parameters, a tree of arrays.
    tokenizer: text to ids; None for a model that is used with ids only.
    sampler: how `generate`, `infill` and `chat` decode unless told otherwise.
    conversation: how messages become a prompt; None for a model that does not chat.
    stop_ids: ids that end an answer besides `config.eos_token_id`, such as the end of a turn.
    mesh: where the parameters lie; None: on one device.
    source: the folder that the weights are from, so that `save` can write it again as it was.
  """

  config: ModelConfig
  params: object
  tokenizer: Tokenizer | None = None
  sampler: SamplerConfig = SamplerConfig()
  conversation: Chat | None = None
  stop_ids: tuple[int, ...] = ()
  mesh: jax.sharding.Mesh | None = None
  source: Source | None = None

  def logits(self, tokens) -> Logits:
    """float32 logits [B, L, V] of ids [B, L] (or one row [L], then [L, V]).

    Raises:
      ValueError: for ids outside the vocabulary or rows longer than the context.
    """
    tokens = np.asarray(tokens)
    rows = tokens[None] if tokens.ndim == 1 else tokens
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
      raise ValueError(f"expected integer ids [B, L] or [L], got {tokens.dtype}{tokens.shape}")
    self._check_ids(rows)
    with self.on_mesh():
      logits = _logits(self.config, self.params, jnp.asarray(rows, jnp.int32))
    return logits[0] if tokens.ndim == 1 else logits

  def generate(
    self,
    prompts: str | Sequence[str],
    *,
    sampler: SamplerConfig | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
  ) -> str | list[str]:
    """Continues prompts, each as it would be continued alone with its own seed.

    Args:
      prompts: a text, or several; "" starts from an empty canvas.
      sampler: how to decode; default `self.sampler`.
      seed: row r of a number s uses s + r; or one seed per prompt. Only read if something is drawn.
      stop: texts that end an answer, which is cut before the first of them; no block is written
        after one that completes such a text.

    Returns:
      What was written after each prompt, up to the end of text: a string for a string, else a list.

    Raises:
      ValueError: for a prompt with a MASK in it, or one that leaves no room in the context.
    """
    rows = [prompts] if isinstance(prompts, str) else list(prompts)
    stops = [stop] if isinstance(stop, str) else list(stop)
    answers = self.generate_tokens(rows, sampler=sampler, seed=seed, stop=stops).answers
    texts = [cut_before(self.decode(answer), stops) for answer in answers]
    return texts[0] if isinstance(prompts, str) else texts

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids. Ids without a token (embeddings are padded to round sizes) stand for nothing."""
    known = self._tokenizer.vocab_size
    return self._tokenizer.decode([i for i in ids if i < known])

  def generate_tokens(
    self,
    prompts: Sequence[str | Sequence[int]],
    *,
    sampler: SamplerConfig | None = None,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
  ) -> GenerateResult:
    """`generate` for texts or ids, with everything that happened: see `GenerateResult`.

    An answer that was stopped is whole up to the end of its block.
    """
    if "" in stop:
      raise ValueError("an empty text stops every answer before it begins; leave it out of `stop`")
    for prompt in prompts:
      if isinstance(prompt, str) and MASK_TEXT in prompt:
        raise ValueError(f"the prompt {prompt[:60]!r} contains {MASK_TEXT}; use infill for that")
    rows = [self._tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    options = {}
    if stop:
      options["stop"] = lambda ids: any(text in self.decode(ids) for text in stop)
    return self._decode(generate_ids, rows, sampler, seed, **options)

  def chat(
    self,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    sampler: SamplerConfig | None = None,
    seed: int = 0,
    **options: Any,
  ) -> str:
    """The assistant's answer to a conversation.

    Args:
      messages: each with a role ("system", "user", "assistant") and a content; a string is one
        message of the user.
      sampler, seed: as in `generate`.
      **options: variables of the chat template, such as `tools`.

    Raises:
      ValueError: for malformed messages, a model without a chat template, or a conversation that
        leaves no room in the context.
    """
    prompt = self.chat_prompt(messages, **options)
    result = self.generate_tokens([prompt], sampler=sampler, seed=seed)
    return self.decode(result.answers[0])

  def chat_prompt(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Ids of a conversation up to where the assistant begins; see `chat`."""
    if self.conversation is None:
      raise ValueError("this model has no chat template: it was trained on text, use generate")
    if isinstance(messages, str):
      messages = [{"role": "user", "content": messages}]
    return self.conversation.encode(messages, **options)

  def engine(self, *, sampler: SamplerConfig | None = None, slots: int, length: int) -> Engine:
    """Decodes requests that come and go, block by block; see `lladax.infer.engine`.

    It is made and used on the mesh of the parameters: inside `with model.on_mesh():`.

    Args:
      sampler: how to decode; default `self.sampler`.
      slots: requests at a time.
      length: room for a prompt and its answer.

    Raises:
      ValueError: for a model without a mask token, or more room than it has positions for.
    """
    self._check_mask()
    if length > self.config.max_position_embeddings:
      raise ValueError(
        f"a length of {length} is more than the context of {self.config.max_position_embeddings}"
      )
    sampler = sampler or self.sampler
    return Engine(
      self.denoiser(sampler),
      self.params,
      sampler,
      slots=slots,
      length=length,
      mask_id=self.config.mask_token_id,
      eos_ids=(self.config.eos_token_id, *self.stop_ids),
      pad_id=self.config.pad_token_id,
    )

  def infill(
    self, text: str, *, sampler: SamplerConfig | None = None, seed: int | Sequence[int] = 0
  ) -> str:
    """The text with each "<|mask|>" in it replaced by one token; the rest stays as it is.

    Raises:
      ValueError: if there is nothing to fill, or the text is longer than the context.
    """
    result = self.infill_tokens([text], sampler=sampler, seed=seed)
    return self.decode(result.answers[0])

  def infill_tokens(
    self,
    texts: Sequence[str | Sequence[int]],
    *,
    sampler: SamplerConfig | None = None,
    seed: int | Sequence[int] = 0,
  ) -> GenerateResult:
    """`infill` for texts, or ids with the mask id, with everything that happened."""
    rows = [
      encode_with_masks(self._tokenizer, text, MASK_TEXT) if isinstance(text, str) else list(text)
      for text in texts
    ]
    for row, text in zip(rows, texts, strict=True):
      if self.config.mask_token_id not in row:
        raise ValueError(f"nothing to fill: there is no {MASK_TEXT} in {text[:60]!r}")
    return self._decode(infill_ids, rows, sampler, seed)

  def log_likelihood(
    self,
    prompt: str | Sequence[int],
    answer: str | Sequence[int],
    *,
    mc_num: int = 128,
    seed: int = 0,
  ) -> float:
    """A lower bound on log p(answer | prompt) in nats, by Monte Carlo over masks.

    Args:
      prompt, answer: texts or ids; the prompt may be empty.
      mc_num: samples of the mask. 1 is exact for a single token; LLaDA uses 128.
      seed: with it and the text, the estimate is fixed.

    Raises:
      ValueError: for an empty answer or one that does not fit the context with its prompt.
    """
    prompt, answer = (
      self._tokenizer.encode(text) if isinstance(text, str) else list(text)
      for text in (prompt, answer)
    )
    if not answer:
      raise ValueError("the answer is empty: there is nothing to score")
    ids = np.asarray(prompt + answer)
    self._check_ids(ids[None])
    if self.config.mask_token_id in ids:
      raise ValueError(f"prompt or answer contains the mask id {self.config.mask_token_id}")
    batch = _scoring_batch(ids, len(prompt), self.config.pad_token_id)
    with self.on_mesh():
      return float(_log_likelihood(self.config, self.params, batch, seed, mc_num=mc_num)[0])

  def save(self, path: str | os.PathLike, *, format: str = "hf", **options: Any) -> None:
    """Writes a folder in the format of Hugging Face: weights, config, tokenizer, model card.

    Args:
      path: a folder that does not exist yet.
      format: "hf", safetensors under the names of the model's family, which the torch
        implementations read.
      **options: of `lladax.hub.save_folder`, such as `max_shard_size`.

    Raises:
      ValueError: for another format, a model whose fields no family has, or an existing folder.
    """
    if format != "hf":
      raise ValueError(f"unknown format {format!r}; there is 'hf'")
    if not self.config.stacked:
      raise ValueError("this model was made ready for inference; save it as it was loaded")
    save_folder(
      path,
      config=self.config,
      params=self.params,
      tokenizer=self.tokenizer,
      template=None if self.conversation is None else self.conversation.template,
      source=self.source,
      **options,
    )

  def on_mesh(self) -> contextlib.AbstractContextManager:
    """The context in which the parameters are used."""
    return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh)

  @property
  def _tokenizer(self) -> Tokenizer:
    if self.tokenizer is None:
      raise ValueError("this model has no tokenizer: pass ids, or give Model a tokenizer")
    return self.tokenizer

  def _check_mask(self):
    if self.config.mask_token_id is None:
      raise ValueError("this model has no mask token, so there is nothing to unmask; it can score")

  def _check_ids(self, rows: np.ndarray):
    vocabulary, context = self.config.vocab_size, self.config.max_position_embeddings
    if rows.size and not (rows.min() >= 0 and rows.max() < vocabulary):
      raise ValueError(f"ids lie in 0..{vocabulary - 1}; got {rows.min()}..{rows.max()}")
    if rows.shape[1] > context:
      raise ValueError(f"{rows.shape[1]} tokens do not fit the context of {context}")

  def _decode(self, decode, rows, sampler, seed, **options) -> GenerateResult:
    for row in rows:
      self._check_ids(np.asarray(row, np.int64)[None])
    self._check_mask()
    sampler = sampler or self.sampler
    with self.on_mesh():
      return decode(
        self.denoiser(sampler),
        self.params,
        rows,
        sampler,
        mask_id=self.config.mask_token_id,
        eos_id=(self.config.eos_token_id, *self.stop_ids),
        pad_id=self.config.pad_token_id,
        seeds=seed,
        max_length=self.config.max_position_embeddings,
        **options,
      )

  def denoiser(self, sampler: SamplerConfig) -> Denoiser:
    """The network as this sampler reads it: block-causal for a `BlockCausal` cache."""
    causal = isinstance(sampler.cache, BlockCausal)
    return Denoiser(self.config, block_length=sampler.block_length if causal else None)

  def for_inference(self, *, weights: str | None = None) -> Model:
    """The same model in the form in which it decodes fastest. It cannot be trained or saved.

    See `lladax.models.for_inference`: layers apart, weights in the dtype of computation, experts
    that are computed for few tokens, on a mesh where they lie.

    Args:
      weights: of the experts, "int8" or "fp8"; None: in the dtype of computation.

    Raises:
      ValueError: for other weights, or where the model has no experts to quantise.
    """
    with self.on_mesh():
      config, params = for_inference(self.config, self.params, weights=weights)
    return dataclasses.replace(self, config=config, params=params)


def cut_before(text: str, stops: Sequence[str]) -> str:
  """The text up to the first of `stops` in it."""
  return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


def _scoring_batch(ids: np.ndarray, prompt_length: int, pad_id: int, multiple: int = 32) -> Batch:
  """One row, padded on the right to a multiple so that few lengths are compiled."""
  length = -(-len(ids) // multiple) * multiple
  real = np.arange(length) < len(ids)
  return Batch(
    tokens=np.pad(ids.astype(np.int32), (0, length - len(ids)), constant_values=pad_id)[None],
    segment_ids=real.astype(np.int32)[None],
    positions=np.arange(length, dtype=np.int32)[None],
    maskable=(real & (np.arange(length) >= prompt_length))[None],
  )


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
  return Transformer(config).apply({"params": params}, tokens)[0]


@functools.partial(jax.jit, static_argnums=0, static_argnames="mc_num")
def _log_likelihood(config, params, batch, seed, *, mc_num):
  mc_batch = next(size for size in (16, 8, 4, 2, 1) if mc_num % size == 0)
  rows = repeat_rows(batch, mc_batch)
  return log_likelihood_bound(
    bind_token_nll(config, params, rows.positions, rows.segment_ids),
    batch,
    seed=seed,
    mask_id=config.mask_token_id,
    mc_num=mc_num,
    mc_batch=mc_batch,
  )
