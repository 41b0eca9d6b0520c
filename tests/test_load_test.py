"""The load test: it finds what is lost or different, and stays on this machine."""

import json

import pytest

from experiments.load_test import (
  MALFORMED,
  Outcome,
  check_local,
  main,
  percentile,
  report,
  valid_requests,
)
from lladax.serve import Limits, RequestError, parse_completion


def outcome(text, status=200):
  return Outcome(status=status, answer=None if text is None else [[text, "length"]], tokens=2)


def test_a_lost_and_a_different_answer_are_counted():
  alone = [outcome(text) for text in "abcd"]
  outcomes = [("valid", 0, outcome("a")), ("valid", 1, outcome("x")), ("valid", 2, outcome(None))]
  outcomes += [("cancelled", 3, outcome(None)), ("malformed", 0, outcome(None, 400))]
  outcomes += [("malformed", 1, outcome(None, 500))]
  numbers = report(alone, 1.0, outcomes, 2.0, True)
  assert (numbers["lost"], numbers["different"], numbers["malformed_wrong"]) == (1, 2, 1)
  assert (numbers["valid"], numbers["cancelled"], numbers["malformed"]) == (3, 1, 2)
  assert numbers["tokens_per_second"] == 3.0


def test_its_requests_are_valid_and_the_malformed_are_not():
  limits = Limits()
  requests = valid_requests(60, 0, 32)
  assert requests == valid_requests(60, 0, 32) != valid_requests(60, 1, 32)
  asks = [parse_completion(body, limits) for body in requests]
  assert any(ask.stream for ask in asks) and any(ask.suffix for ask in asks)
  assert any(ask.stop for ask in asks) and any(ask.temperature for ask in asks)
  refused = 0
  for body, status in MALFORMED:
    assert 400 <= status < 500
    try:
      parse_completion(json.loads(body), limits)
    except (ValueError, RequestError):
      refused += 1
  assert refused == len(MALFORMED) - 2  # an unknown model and a long prompt: the server's to refuse


def test_other_machines_are_left_alone():
  check_local("http://127.0.0.1:8000")
  with pytest.raises(ValueError, match="is not on this machine"):
    check_local("http://192.0.2.1:8000")


def test_percentiles():
  assert percentile([], 0.5) is None
  assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0 and percentile([1.0], 0.95) == 1.0


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
  path = tmp_path / "load.json"
  flags = ["--random", "--requests=30", "--malformed=8", "--clients=8", f"--json={path}"]
  assert main(flags) == 0
  numbers = json.loads(path.read_text())
  assert (numbers["valid"], numbers["cancelled"], numbers["malformed"]) == (27, 3, 8)
