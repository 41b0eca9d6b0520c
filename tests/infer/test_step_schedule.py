"""Schedules of steps by hand. Their laws: tests/contracts; Dream's numbers: test_dinfer_rules."""

import jax.numpy as jnp
import numpy as np
import pytest

from lladax.infer import EqualShares, LinearTime


def given_out(schedule, masks, steps):
  """What a rule that keeps to its budget writes in each step."""
  left, numbers = masks, []
  for iteration in range(steps):
    budget = schedule(jnp.array([masks]), jnp.array([left]), iteration, steps)
    numbers.append(int(budget[0]))
    left -= numbers[-1]
  return numbers


@pytest.mark.quick
@pytest.mark.parametrize("masks,steps", [(10, 4), (3, 8), (16, 16), (0, 5), (7, 1)])
def test_equal_shares_are_masks_over_steps_with_the_remainder_first(masks, steps):
  expected = [masks // steps + (i < masks % steps) for i in range(steps)]
  assert given_out(EqualShares(), masks, steps) == expected


def test_a_rule_that_fell_behind_or_ran_ahead_is_given_what_there_is():
  at_start, left = jnp.array([8, 8]), jnp.array([7, 1])
  np.testing.assert_array_equal(EqualShares()(at_start, left, 1, 4), [2, 1])
  np.testing.assert_array_equal(EqualShares()(at_start, left, 3, 4), [7, 1])


def test_linear_time_asks_for_nothing_first_and_for_the_rest_last():
  """Time ends at 0.001 and not at 0, so a step's share of 8 masks is a little less than one."""
  assert given_out(LinearTime(), 8, 8) == [0, 1, 1, 1, 1, 1, 1, 2]
  assert given_out(LinearTime(eps=0.0), 12, 4) == [3, 3, 3, 3]
  first = LinearTime()(jnp.array([8]), jnp.array([8]), 0, 8)
  np.testing.assert_allclose(first, 0.999, rtol=1e-4)


@pytest.mark.parametrize("eps", [-0.1, 1.0, float("nan")])
def test_an_end_of_time_out_of_range_is_an_error(eps):
  with pytest.raises(ValueError, match="eps, where time ends, lies between 0 and 1; got"):
    LinearTime(eps)
