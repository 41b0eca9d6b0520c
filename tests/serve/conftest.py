"""Models for the server's tests: a tiny real one, and one whose network is never asked."""

import dataclasses

import pytest
from small_models import small_config, small_model

import lladax
from lladax.data import Bytes, train_bpe
from lladax.hub import BUILT_IN, Chat
from lladax.infer import SamplerConfig

SAMPLER = SamplerConfig(gen_length=16, steps=16, block_length=8)


@pytest.fixture(scope="session")
def text_model():
  """Parameters, bytes, no chat template."""
  return small_model(Bytes(), context=96, sampler=SAMPLER)


@pytest.fixture(scope="session")
def paper_model():
  """No parameters: for servers over a stand-in. It reads bytes and has a chat template."""
  chat_tokenizer = train_bpe(["User: to be\n\nAssistant: or not to be"], 300)
  return lladax.Model(
    config=dataclasses.replace(small_config(Bytes(), context=96), vocab_size=300),
    params={},
    tokenizer=Bytes(),
    sampler=SAMPLER,
    conversation=Chat(chat_tokenizer, BUILT_IN["plain"]),
  )
