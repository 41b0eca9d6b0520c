"""The command that serves: from an address to an end."""

import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from lladax.serve.address import bind


def test_an_address_that_is_taken_is_named():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}: "):
      bind("127.0.0.1", port)
  with bind("127.0.0.1", 0) as free:
    assert free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_ends_its_answers_and_well(chatty, ending):
  sampler = ["--set=gen_length=64", "--set=steps=64", "--set=block_length=16"]
  line = [sys.executable, "-m", "lladax.serve", f"--model={chatty}", "--port=0", *sampler]
  with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as server:
    try:
      lines = iter(server.stderr.readline, "")
      url = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
      body = {"prompt": "a man", "stream": True}
      with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
        pieces = reply.iter_lines()
        next(pieces)
        server.send_signal(ending)
        assert [piece for piece in pieces if piece][-1] == "data: [DONE]"
      assert server.wait(60) == 0
      assert "Traceback" not in server.stderr.read()
    finally:
      server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_help_names_the_flags_that_every_command_has(command):
  line = [sys.executable, "-m", f"lladax.{command}", "--help"]
  shown = subprocess.run(line, capture_output=True, text=True).stdout
  for flag in ("--model", "--dtype", "--weights", "--mesh", "--sampler", "--set", "gen_length"):
    assert flag in shown


@pytest.mark.slow
def test_what_cannot_be_served_is_one_line(chatty):
  line = [sys.executable, "-m", "lladax.serve", f"--model={chatty}", "--port=0"]
  done = subprocess.run([*line, "--length=8"], capture_output=True, text=True)
  assert done.returncode == 1 and "error: length lies between one block" in done.stderr
  assert "Traceback" not in done.stderr
