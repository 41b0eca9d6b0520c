"""Laws of mixtures: draws by weight, every row once an epoch, nothing repeated across stages."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.data.mixture import LONGEST_PERIOD, Mixture, Part, order_seed, schedule


def mixture(sizes, weights=None, seed=0):
  weights = weights or [1.0] * len(sizes)
  return Mixture(
    Part(name=f"s{i}", key=f"k{i}", size=size, weight=weight, order_seed=order_seed(seed, i))
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
  )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any))
def test_counts_never_deviate_by_a_row(counts):
  counts = np.array(counts)
  table = schedule(counts)
  assert np.bincount(table, minlength=len(counts)).tolist() == counts.tolist()
  drawn = np.cumsum(table[:, None] == np.arange(len(counts)), axis=0)  # [period, sources]
  times = np.arange(1, len(table) + 1)[:, None]
  assert (np.abs(drawn * len(table) - counts * times) < len(table)).all()


@pytest.mark.parametrize(
  ("weights", "period"),
  [((1, 1), 2), ((0.7, 0.3), 10), ((0.35, 0.15, 0.5), 20), ((3, 0, 1), 4), ((1e-3, 2.0), 2001)],
)
def test_decimal_weights_are_exact(weights, period):
  mixed = mixture([5] * len(weights), list(weights))
  assert mixed.period == period
  assert np.allclose(mixed.shares, np.array(weights) / sum(weights), rtol=1e-15)


@pytest.mark.parametrize("weights", [(1 / 3, 0.7), (1e-9, 1.0), (np.pi, np.e, 1 / 7)])
def test_other_weights_are_rounded_and_none_is_lost(weights):
  mixed = mixture([5] * len(weights), list(weights))
  assert LONGEST_PERIOD <= mixed.period <= LONGEST_PERIOD + len(weights)
  assert np.abs(mixed.shares - np.array(weights) / sum(weights)).max() < 2 / LONGEST_PERIOD
  assert (mixed.shares > 0).all()


@settings(deadline=None, max_examples=40)
@given(
  st.lists(st.integers(1, 7), min_size=1, max_size=4),
  st.lists(st.integers(1, 5), min_size=4, max_size=4),
  st.lists(st.integers(0, 50), min_size=1, max_size=6),
)
def test_any_slice_of_the_draws_is_that_slice(sizes, weights, cuts):
  mixed = mixture(sizes, weights[: len(sizes)])
  whole = mixed.draws(0, 60)
  for cut in cuts:
    part = mixed.draws(cut, 10)
    for name in ("number", "part", "position"):
      assert np.array_equal(getattr(part, name), getattr(whole, name)[cut : cut + 10])
    expected = np.bincount(whole.part[:cut], minlength=len(sizes))
    assert list(mixed.counts(cut).values()) == expected.tolist()


def follow(stages, sizes, seed=3):
  """(part, row) of every draw of successive stages [(weights, draws)]."""
  seen, start = [], {}
  for weights, count in stages:
    mixed = mixture(sizes, weights, seed)
    draws = mixed.draws(0, count, start)
    seen += zip(draws.part.tolist(), mixed.rows(draws).tolist(), strict=True)
    start = {key: start.get(key, 0) + n for key, n in mixed.counts(count).items()}
  return seen, start


# Orders of a handful of rows take the library milliseconds a row.
@settings(deadline=None, max_examples=12)
@given(
  st.lists(st.integers(25, 60), min_size=2, max_size=3),
  st.lists(
    st.tuples(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.integers(0, 90)),
    min_size=1,
    max_size=4,
  ),
)
def test_no_row_is_repeated_or_skipped_over_stages(sizes, stages):
  stages = [(weights[: len(sizes)], count) for weights, count in stages]
  stages = [(weights, count) for weights, count in stages if any(weights)]
  seen, drawn = follow(stages, sizes)
  for part, size in enumerate(sizes):
    rows = [row for p, row in seen if p == part]
    assert len(rows) == drawn.get(f"k{part}", 0)
    for first in range(0, len(rows), size):
      epoch = rows[first : first + size]
      assert len(set(epoch)) == len(epoch)  # once each, and all of them once the epoch is over
    # The order is that of the source drawn alone: the weights of no stage touch it.
    alone = mixture(sizes, [float(i == part) for i in range(len(sizes))], 3)
    expected = alone.rows(alone.draws(0, len(rows))) if rows else []
    assert rows == list(expected)


def test_the_order_is_that_of_the_library():
  order = grain.MapDataset.range(13).shuffle(seed=2**32 - 2).repeat()
  part = Part(name="a", key="k", size=13, order_seed=2**32 - 2)
  assert [part.row(i) for i in range(60)] == [order[i] for i in range(60)]


def test_epochs_and_seeds_have_their_own_orders():
  orders = set()
  for seed in range(3):
    mixed = mixture([50], seed=seed)
    rows = mixed.rows(mixed.draws(0, 150)).reshape(3, 50)
    orders |= {tuple(row) for row in rows.tolist()}
  assert len(orders) == 9


@pytest.mark.parametrize(
  ("parts", "message"),
  [
    ([], "at least one source"),
    ([dict(weight=-0.5)], "source 'a': a weight is at least 0, got -0.5"),
    ([dict(weight=float("nan"))], "a weight is at least 0, got nan"),
    ([dict(weight=0.0), dict(name="b", key="l", weight=0.0)], "weights of all 2 sources are 0"),
    ([dict(size=0)], "source 'a' has 0 rows: there is no text"),
    ([dict(), dict(name="b")], "sources 'a', 'b' have the same content"),
    ([dict(), dict(key="l")], "have the same name"),
  ],
)
def test_bad_mixtures(parts, message):
  with pytest.raises(ValueError, match=message):
    Mixture([Part(**{"name": "a", "key": "k", "size": 3, **part}) for part in parts])
