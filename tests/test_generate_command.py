"""The command on files of prompts: read, answered, gone on with."""

import io
import json
import signal
import subprocess
import sys
import time

import pytest

import lladax
from lladax.infer import SamplerConfig
from lladax.prompts import Answers, Prompt, read_prompts


def write(path, *lines):
  path.write_text("\n".join(lines) + "\n")
  return str(path)


def test_prompts_are_json_or_lines(tmp_path, monkeypatch):
  rows = ['{"prompt": "a\\u2028b"}', "", '{"messages": [{"role": "user", "content": "hi"}]}']
  rows += ['{"infill": "x<|mask|>"}', '{"prompt": ""}']
  prompts = [
    Prompt(prompt="a\u2028b"),
    Prompt(messages=({"role": "user", "content": "hi"},)),
    Prompt(infill="x<|mask|>"),
    Prompt(prompt=""),
  ]
  assert read_prompts(write(tmp_path / "a.jsonl", *rows)) == prompts
  assert [prompt.text for prompt in prompts] == ["a\u2028b", "hi", "x<|mask|>", ""]
  (tmp_path / "b.jsonl").write_text("\n".join(rows), encoding="utf-8-sig")  # as Windows has it
  assert read_prompts(str(tmp_path / "b.jsonl")) == prompts
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(rows)))
  assert read_prompts("-") == prompts
  lines = read_prompts(write(tmp_path / "a.txt", "one", "", " two\u2028", "{three\r"))
  assert [prompt.prompt for prompt in lines] == ["one", " two\u2028", "{three"]


@pytest.mark.parametrize(
  "line, message",
  [
    ("{", "a.jsonl:2 is not JSON"),
    ("[]", 'a.jsonl:2: expected one of "prompt"'),
    ("{}", "expected one of"),
    ('{"prompt": "a", "infill": "b"}', "expected one of"),
    ('{"prompt": 3}', "prompt is not what it should be, str: 3"),
    ('{"messages": []}', "messages is not what it should be"),
    ('{"prompt": "\\ud800"}', "a.jsonl:2: prompt holds half of a character"),
  ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, message):
  with pytest.raises(ValueError, match=message):
    read_prompts(write(tmp_path / "a.jsonl", '{"prompt": "a"}', line))
  with pytest.raises(ValueError, match="holds no prompt"):
    read_prompts(write(tmp_path / "b.jsonl", ""))


def test_answers_are_gone_on_with(tmp_path):
  prompts = [Prompt(prompt=text) for text in "abcd"]
  path = tmp_path / "answers.jsonl"
  with Answers(str(path), prompts, settings="x") as answers:
    assert answers.missing == [0, 1, 2, 3]
    answers.add(2, text="é\u2028")
    answers.add(0, text="y")
  whole = path.read_bytes()
  # Killed in the middle of a line, even of a character.
  path.write_bytes(whole + '{"index": 1, "text": "é'.encode()[:-1])
  with Answers(str(path), prompts, settings="x") as answers:
    assert answers.missing == [1, 3]
    answers.add(1, text="z")
  rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
  assert [row["index"] for row in rows] == [2, 0, 1]
  assert rows[0]["prompt"] == "c" and rows[0]["text"] == "é\u2028"
  for other, settings in ((prompts, "y"), (prompts[1:], "x"), (prompts[:2], "x")):
    with pytest.raises(ValueError, match=r"answers.jsonl:1 is no answer to these prompts"):
      Answers(str(path), other, settings=settings)
  path.write_bytes(b"\xff\n")
  with pytest.raises(ValueError, match="name another --output"):
    Answers(str(path), prompts, settings="x")
  path.write_text("something else\n")
  with pytest.raises(ValueError, match="name another --output"):
    Answers(str(path), prompts, settings="x")


def command_line(model, *flags):
  sampler = ["--set=gen_length=8", "--set=steps=4", "--set=block_length=8", "--set=temperature=1.0"]
  return [sys.executable, "-m", "lladax.generate", f"--model={model}", *sampler, *flags]


def command(model, *flags, **options):
  return subprocess.run(command_line(model, *flags), capture_output=True, text=True, **options)


ROWS = [{"prompt": "a man"}, {"infill": "a <|mask|><|mask|> plan"}, {"prompt": "a canal, a plan"}]
ROWS += [{"messages": [{"role": "user", "content": "a plan"}]}, {"prompt": ""}]


@pytest.mark.slow
def test_a_file_is_answered_and_a_killed_run_goes_on_to_the_same_answers(chatty, tmp_path):
  asked = write(tmp_path / "asked.jsonl", *map(json.dumps, ROWS))
  output = tmp_path / "answers.jsonl"
  flags = [f"--prompts={asked}", f"--output={output}", "--seed=7"]
  done = command(chatty, *flags, "--batch=4")
  assert done.returncode == 0, done.stderr
  whole = {row["index"]: row for row in map(json.loads, output.read_text().splitlines())}
  assert sorted(whole) == [0, 1, 2, 3, 4]
  assert all({**whole[i], **row} == whole[i] for i, row in enumerate(ROWS))
  assert whole[1]["text"].startswith("a ") and whole[1]["text"].endswith(" plan")
  # Each answer is that of its line alone.
  model = lladax.load(chatty, progress=False)
  sampler = SamplerConfig(gen_length=8, steps=4, block_length=8, temperature=1.0)
  assert whole[0]["text"] == model.generate("a man", sampler=sampler, seed=7)
  output.write_bytes(output.read_bytes()[: len(json.dumps(whole[0])) + 20])  # one line and a bit
  again = command(chatty, *flags, "--batch=2")
  assert again.returncode == 0, again.stderr
  assert {row["index"]: row for row in map(json.loads, output.read_text().splitlines())} == whole


@pytest.mark.slow
def test_ctrl_c_says_that_it_can_be_gone_on_with(chatty, tmp_path):
  asked = write(tmp_path / "asked.txt", *["a man"] * 2000)
  output = tmp_path / "answers.jsonl"
  line = command_line(chatty, f"--prompts={asked}", f"--output={output}")
  with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as running:
    while running.poll() is None and not (output.exists() and output.stat().st_size):
      time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
  assert running.returncode == 130 and "the same command goes on" in said
  assert "Traceback" not in said


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_written(chatty, tmp_path):
  asked = write(tmp_path / "asked.txt", "a man", "a plan " * 100)
  output = tmp_path / "answers.jsonl"
  done = command(chatty, f"--prompts={asked}", f"--output={output}")
  assert done.returncode and not output.exists()
  assert "prompt 1 has" in done.stderr and "more than the context of 128" in done.stderr


@pytest.mark.slow
def test_standard_input_is_a_prompt_and_stop_cuts_the_answer(chatty):
  done = command(chatty, "--json", "--seed=7", input="a man\n")
  row = json.loads(done.stdout)
  assert row["prompt"] == "a man" and len(row["text"]) > 3
  cut = command(chatty, "--json", "--seed=7", f"--stop={row['text'][2:4]}", input="a man\n")
  assert json.loads(cut.stdout)["text"] == row["text"].partition(row["text"][2:4])[0]


@pytest.mark.slow
def test_messages_are_answered_on_a_mesh_as_on_one_device(chatty):
  asked = [f"--chat={message}" for message in ("a plan", "a canal")]
  done = command(chatty, "--json", "--mesh=expert=4", "--seed=7", *asked)
  answers = [json.loads(line)["text"] for line in done.stdout.splitlines()]
  model = lladax.load(chatty, progress=False)
  sampler = SamplerConfig(gen_length=8, steps=4, block_length=8, temperature=1.0)
  assert answers == [
    model.chat(message, sampler=sampler, seed=7 + row)
    for row, message in enumerate(("a plan", "a canal"))
  ]
  both = command(chatty, "--json", *asked, "--prompt=a")
  assert both.returncode and "give one of --prompt, --chat" in both.stderr + both.stdout
