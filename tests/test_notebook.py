"""The notebook runs from top to bottom, and is the same as the script it is kept in."""

import json
import os
import pathlib
import sys

import jupytext
import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "colab" / "quickstart.ipynb"
SCRIPT = NOTEBOOK.with_suffix(".py")


def sources(path):
  return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_notebook_and_script_are_one():
  assert sources(NOTEBOOK) == sources(SCRIPT), "run: jupytext --sync colab/quickstart.py"
  for path in (NOTEBOOK, SCRIPT):
    assert jupytext.read(path).metadata["jupytext"]["formats"] == "ipynb,py:percent"


def test_nothing_that_a_run_leaves_is_stored():
  for cell in json.loads(NOTEBOOK.read_text())["cells"]:
    assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  """The notebook after a run at toy size, in an empty folder, by the interpreter of the tests."""
  folder = tmp_path_factory.mktemp("notebook")
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  notebook.cells.append(nbformat.v4.new_code_cell("print(sys.executable)"))
  environment = dict(
    os.environ,
    LLADAX_NOTEBOOK_TOY="1",
    JAX_PLATFORMS="cpu",
    PYTHONPATH=str(ROOT),
    # Nearly all the time is compilation: one device and not the tests' eight, little optimised.
    XLA_FLAGS="--xla_backend_optimization_level=0",
  )
  # Without folders to search there is only the kernel of this interpreter.
  kernels = KernelSpecManager(kernel_dirs=[])
  client = NotebookClient(
    notebook,
    km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels),
    resources={"metadata": {"path": str(folder)}},
    timeout=300,
  )
  client.execute(env=environment)
  return notebook, folder


def outputs(notebook, mime):
  """All outputs of a MIME type; "text/plain" is what was printed."""
  found = []
  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      if output.output_type == "stream" and mime == "text/plain":
        found.append(output.text)
      elif mime in output.get("data", {}):
        found.append(output["data"][mime])
  return found


@pytest.mark.slow
def test_every_cell_runs(executed):
  notebook, _ = executed
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  errors = [o for cell in code for o in cell.outputs if o.output_type == "error"]
  assert not errors
  assert outputs(notebook, "text/plain")[-1].strip() == sys.executable


@pytest.mark.slow
def test_what_it_promises_is_shown(executed):
  notebook, folder = executed
  assert len(outputs(notebook, "image/png")) == 2
  # The canvas, whose pictures replace one another, and three infilled texts.
  pages = outputs(notebook, "text/html")
  assert len(pages) == 4 and not any("░" in page for page in pages)
  assert all("Good" in page and "the king." in page for page in pages[1:])
  assert (folder / "runs" / "quickstart" / "metrics.jsonl").exists()
  printed = "".join(outputs(notebook, "text/plain"))
  assert "step 6/6" in printed and printed.count("log p is at least") == 2
