"""Models for the server's tests: a tiny real one, and one whose network is never asked."""

import dataclasses

import pytest

import lladax
from lladax.data import Bytes, train_bpe
from lladax.hub import BUILT_IN, Chat
from lladax.infer import SamplerConfig
from lladax.models import tiny
from lladax.moe import MoEConfig

SAMPLER = SamplerConfig(gen_length=16, steps=16, block_length=8)


def tiny_config(tokenizer):
  return tiny(
    vocab_size=tokenizer.vocab_size,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=8),
    max_position_embeddings=96,
    initializer_range=0.3,  # far from uniform, so that answers differ
    mask_token_id=tokenizer.mask_id,
    eos_token_id=tokenizer.eos_id,
    pad_token_id=tokenizer.pad_id,
  )


@pytest.fixture(scope="session")
def text_model():
  """Parameters, bytes, no chat template."""
  model = lladax.init(tiny_config(Bytes()), seed=1, tokenizer=Bytes())
  model.sampler = SAMPLER
  return model


@pytest.fixture(scope="session")
def paper_model():
  """No parameters: for servers over a stand-in. It reads bytes and has a chat template."""
  chat_tokenizer = train_bpe(["User: to be\n\nAssistant: or not to be"], 300)
  return lladax.Model(
    config=dataclasses.replace(tiny_config(Bytes()), vocab_size=300),
    params={},
    tokenizer=Bytes(),
    sampler=SAMPLER,
    conversation=Chat(chat_tokenizer, BUILT_IN["plain"]),
  )
