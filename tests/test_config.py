"""Laws of configs as text: what is written can be read, what is set is set, and nothing else."""

from __future__ import annotations

import abc
import dataclasses
import json
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lladax import config as config_lib
from lladax.config import ConfigError, diff, fields_help, from_json, override, parse, to_json


class Rule(abc.ABC):
  @abc.abstractmethod
  def apply(self, x): ...


@dataclasses.dataclass(frozen=True)
class Threshold(Rule):
  value: float = 0.9

  def __post_init__(self):
    if not 0 <= self.value <= 1:
      raise ValueError(f"a threshold lies in [0, 1]; got {self.value}")

  def apply(self, x):
    return x > self.value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain(Rule):
  rules: tuple[Rule, ...] = ()
  name: str = "chain"

  def apply(self, x):
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
  """An inner config.

  Attributes:
    width: how wide the
      thing is.
    window: the lowest and the highest step.
  """

  width: int = 8
  window: tuple[int, int] = (0, 10)
  rule: Rule = Threshold()
  limit: float | None = None

  def __post_init__(self):
    if self.window[0] >= self.window[1]:
      raise ValueError(f"the window is empty: {self.window}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  name: str = "run"
  steps: int = 10  # optimizer steps
  rate: Annotated[float, "per step"] = 1e-3
  flag: bool = False
  kind: Literal["a", "b"] = "a"
  paths: str | tuple[str, ...] = "here"
  inner: Inner = Inner()
  maybe: Inner | None = None
  betas: tuple[float, float] = (0.9, 0.95)


floats = st.floats(allow_nan=False)
names = st.text(max_size=12)
thresholds = st.builds(Threshold, st.floats(0, 1))
rules = thresholds | st.builds(Chain, rules=st.lists(thresholds, max_size=3).map(tuple), name=names)
inners = st.builds(
  Inner,
  width=st.integers(),
  window=st.integers(-5, 5).map(lambda low: (low, low + 3)),
  rule=rules,
  limit=st.none() | floats,
)
outers = st.builds(
  Outer,
  name=names,
  steps=st.integers(),
  rate=floats,
  flag=st.booleans(),
  kind=st.sampled_from("ab"),
  paths=st.lists(names, max_size=3).map(tuple),
  inner=inners,
  maybe=st.none() | inners,
  betas=st.tuples(floats, floats),
)


@given(outers)
def test_json_rebuilds_the_config(config):
  assert from_json(to_json(config)) == config


@given(outers)
def test_repr_rebuilds_the_config(config):
  assert parse(repr(config), Outer) == config


@given(outers, outers)
def test_overriding_every_field_by_its_repr_gives_the_other_config(a, b):
  assignments = [f"{field.name}={getattr(b, field.name)!r}" for field in dataclasses.fields(b)]
  assert override(a, assignments) == b


@given(outers, outers)
def test_diff_is_empty_only_between_equals(a, b):
  assert diff(a, a) == []
  assert bool(diff(a, b)) == (to_json(a) != to_json(b))
  assert diff(json.loads(to_json(a)), b) == diff(a, b)


def test_diff_names_path_and_both_values():
  changed = override(Outer(), ["inner.width=9", "inner.rule=Chain()"])
  lines = [str(line) for line in diff(Outer(), changed)]
  assert "inner.width: 8 -> 9" in lines
  assert "inner.rule: Threshold -> Chain" in lines
  assert all(line.startswith("inner.") for line in lines)


@pytest.mark.parametrize(
  "assignment, path, value",
  [
    ("steps=12", "steps", 12),
    ("steps=1_000", "steps", 1000),
    ("rate=1e-4", "rate", 1e-4),
    ("rate=3", "rate", 3.0),
    ("rate=-inf", "rate", float("-inf")),
    ("flag=true", "flag", True),
    ("flag=False", "flag", False),
    ("name=a b=c", "name", "a b=c"),
    ("name='quoted'", "name", "quoted"),
    ("name=3", "name", "3"),
    ("name=None", "name", "None"),
    ("name=", "name", ""),
    ("kind='b'", "kind", "b"),
    ("paths=some/dir", "paths", "some/dir"),
    ("paths=('a','b')", "paths", ("a", "b")),
    ("betas=0.8,1", "betas", (0.8, 1.0)),
    ("inner.limit=2", "inner.limit", 2.0),
    ("inner.rule=Threshold(0.7)", "inner.rule", Threshold(0.7)),
    ("inner.rule=Threshold", "inner.rule", Threshold()),
    ("inner.rule.value=0.5", "inner.rule.value", 0.5),
    ("inner.rule=Chain(rules=(Threshold(1),))", "inner.rule", Chain(rules=(Threshold(1.0),))),
    ("maybe=Inner(rule=Threshold(0.1))", "maybe", Inner(rule=Threshold(0.1))),
    ("maybe=None", "maybe", None),
  ],
)
def test_values_are_read_by_the_annotation(assignment, path, value):
  result = override(Outer(), [assignment])
  for name in path.split("."):
    result = getattr(result, name)
  assert result == value and type(result) is type(value)


def test_literal_needs_no_quotes():
  assert override(Outer(), ["kind=b"]).kind == "b"


def test_later_assignments_win_and_a_whole_object_drops_earlier_fields():
  result = override(Outer(), ["inner.width=1", "inner=Inner(limit=2.0)", "inner.window=(3, 4)"])
  assert result.inner == Inner(limit=2.0, window=(3, 4))
  assert override(Outer(), ["maybe=Inner()", "maybe.width=3"]).maybe == Inner(width=3)


def test_only_the_final_config_is_checked():
  # Either alone is an empty window: (20, 10) or (0, 0).
  result = override(Outer(inner=Inner(window=(0, 10))), ["inner.window=(20, 1)"][:0])
  assert result == Outer()
  staged = ["inner.window=(20, 10)", "inner.window=(20, 30)"]
  assert override(Outer(), staged).inner.window == (20, 30)


@pytest.mark.parametrize(
  "assignment, parts",
  [
    ("stepz=3", ["stepz", "'steps'", "Outer", "betas"]),
    ("inner.widht=3", ["inner.widht", "'width'", "Inner", "limit"]),
    ("steps.a=3", ["steps.a", "10"]),
    ("maybe.width=3", ["maybe.width", "None", "Inner"]),
    ("steps=many", ["steps", "many", "int"]),
    ("steps=1.5", ["steps", "1.5", "int"]),
    ("steps=True", ["steps", "True", "int"]),
    ("rate=fast", ["rate", "fast", "float"]),
    ("flag=2", ["flag", "2", "bool"]),
    ("kind=c", ["kind", "'a'", "'b'"]),
    ("betas=(0.9,)", ["betas", "2 values"]),
    ("betas=0.9", ["betas", "0.9", "tuple"]),
    ("inner.rule=Treshold(0.7)", ["inner.rule", "Treshold", "Threshold"]),
    ("inner.rule=Outer()", ["inner.rule", "Outer", "Chain, Threshold"]),
    ("inner.rule=Threshold(x=1)", ["inner.rule.x", "Threshold", "value"]),
    ("inner.rule=Threshold(1, 2)", ["inner.rule", "1 fields"]),
    ("inner.rule=Threshold('a')", ["inner.rule.value", "'a'", "float"]),
    ("inner.rule=Threshold(7)", ["inner.rule", "[0, 1]", "7"]),
    ("inner.rule=Threshold(**{})", ["inner.rule", "Threshold"]),
    ("inner.window=(5, 1)", ["inner", "window is empty"]),
    ("inner.rule=__import__('os').system('true')", ["inner.rule"]),
    ("steps", ["field=value"]),
    ("=3", ["field=value"]),
  ],
)
def test_mistakes_end_in_one_line_that_names_the_field(assignment, parts):
  with pytest.raises(ConfigError) as caught:
    override(Outer(), [assignment])
  text = str(caught.value)
  assert "\n" not in text
  for part in parts:
    assert part in text


def test_help_lists_every_field_with_type_value_and_comment():
  lines = fields_help(Outer()).splitlines()
  assert "  steps: int = 10  # optimizer steps" in lines
  assert "  inner.width: int = 8  # how wide the thing is." in lines
  assert "  inner.window: tuple[int, int] = (0, 10)  # the lowest and the highest step." in lines
  assert "  inner.rule: Rule, one of Chain, Threshold = Threshold(...)" in lines
  assert "  inner.rule.value: float = 0.9" in lines
  assert "  maybe: Inner or None = None" in lines


@pytest.mark.parametrize(
  "tree, parts",
  [
    ({"class": "subprocess:Popen", "args": "true"}, ["subprocess:Popen", "not a dataclass"]),
    ({"class": "os:system"}, ["os:system", "not a dataclass"]),
    ({"class": "no.such:Thing"}, ["no.such:Thing"]),
    ({"class": "lladax.config:Gone"}, ["lladax.config:Gone"]),
    ({"width": 3}, ["None"]),
  ],
)
def test_json_of_unknown_classes_is_refused(tree, parts):
  with pytest.raises(ConfigError) as caught:
    from_json(json.dumps(tree))
  assert all(part in str(caught.value) for part in parts)


def test_json_of_an_unknown_field_names_it_and_the_known():
  tree = json.loads(to_json(Outer()))
  tree["inner"]["widht"] = 3
  with pytest.raises(ConfigError, match="config.inner.widht.*'width'.*limit"):
    from_json(json.dumps(tree))


def test_json_refuses_values_that_cannot_be_rebuilt():
  with pytest.raises(ConfigError, match="set"):
    config_lib.to_json(Outer(name={1, 2}))


def test_a_config_that_was_saved_before_its_classes_moved_is_read():
  from lladax.infer import NoEosLogits, SamplerConfig

  config = SamplerConfig(gen_length=64, eos=NoEosLogits())
  text = to_json(config)
  old = text.replace("lladax.infer.eos:", "lladax.infer.denoiser:")
  old = old.replace("lladax.infer.config:", "lladax.infer.sampler:")
  assert old != text and from_json(old) == config
