"""A published sampler takes the length that is asked for."""

import pytest

from lladax.config import override
from lladax.infer import PUBLISHED
from lladax.model_flags import published


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_length_is_the_one_asked_for(name):
  assert published(name, []) == PUBLISHED[name]()
  assignments = ["gen_length=8", "temperature=0.5", "gen_length = 192"]
  config = override(published(name, assignments), assignments)
  assert (config.gen_length, config.temperature) == (192, 0.5)
  assert published(name, ["gen_length=many"]) == PUBLISHED[name]()


def test_a_length_may_come_with_blocks_that_divide_it():
  assignments = ["gen_length=100", "block_length=50"]
  config = override(published("dinfer", assignments), assignments)
  assert (config.gen_length, config.block_length, config.steps) == (100, 50, 100)
