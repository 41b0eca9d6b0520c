"""Where chat templates run: Jinja's immutable sandbox, since templates come from the network."""

from __future__ import annotations

import datetime
import functools
import json


@functools.lru_cache(maxsize=32)
def compile_template(source: str):
  """A template, with what published ones expect besides plain Jinja; `render(variables)` runs it."""
  try:
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError:
    raise ImportError("chat templates need jinja2: pip install 'lladax[hub]'") from None

  class Generation(ext.Extension):
    """`{% generation %}` marks the assistant's words for training; a prompt is the same without."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.Scope(body).set_lineno(line)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes HTML, which no tokenizer was trained on.
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
  return environment.from_string(source)
