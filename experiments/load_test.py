"""Load a server with requests of every kind and count what is lost.

A server is started on this machine (or one that runs is given by --url, on this machine, too). Each
valid request is asked alone first. Then all of them are asked again, `--clients` at a time, in
another order, with a tenth cancelled after their first block and malformed ones among them. Nothing
is lost if every valid request got an answer, equal to the one it got alone; every malformed one got
a 4xx error; and the server is idle and healthy at the end.

  python experiments/load_test.py --model=runs/tiny_text
  python experiments/load_test.py --random --requests=200 --clients=32 --json=load.json

Prints the numbers; the exit status is 1 if anything was lost. Needs the extra `serve`.

Expected: lost 0, different 0, whatever the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import platform
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx

MALFORMED = (
  (b"{", 400),
  (b"[]", 400),
  (b"{}", 400),
  (b'{"prompt": 3}', 400),
  (b'{"prompt": "a", "max_tokens": 0}', 400),
  (b'{"prompt": "a", "temprature": 1}', 400),
  (b'{"prompt": "a", "model": "nobody"}', 404),
  (b'{"prompt": "%s"}' % (b"a" * 100_000), 400),
)


@dataclasses.dataclass
class Outcome:
  """What came of one request.

  Attributes:
    status: of HTTP; 0 where the connection failed.
    answer: texts and why they ended; None without.
    seconds: until the answer was whole; first: until its first piece, if it was streamed.
    tokens: of the answer.
  """

  status: int = 0
  answer: list | None = None
  seconds: float = 0.0
  first: float | None = None
  tokens: int = 0


def valid_requests(count: int, seed: int, max_tokens: int) -> list[dict]:
  """Requests of every kind, a function of the seed."""
  draw = random.Random(seed)
  words = "to be or not that is the question whether tis nobler in mind suffer".split()
  requests = []
  for number in range(count):
    text = " ".join(draw.choices(words, k=draw.randint(1, 6)))
    body = {"prompt": text, "seed": number, "max_tokens": draw.randint(1, max_tokens)}
    kind = number % 6
    if kind == 1:
      body["stream"] = True
    elif kind == 2:
      body |= {"suffix": " " + draw.choice(words), "max_tokens": draw.randint(1, max_tokens // 2)}
    elif kind == 3:
      body["temperature"] = 0.7
    elif kind == 4:
      body |= {"prompt": [text, draw.choice(words)], "stream": True, "frames": True}
    elif kind == 5:
      body |= {"n": 2, "stop": [" the", "e "]}
    requests.append(body)
  return requests


async def ask(client: httpx.AsyncClient, body: dict, *, cancel: bool = False) -> Outcome:
  """One request; with `cancel`, streamed and left after its first piece."""
  outcome, begin = Outcome(), time.perf_counter()
  body = {**body, "stream": True} if cancel else body
  try:
    if not body.get("stream"):
      reply = await client.post("/v1/completions", json=body)
      outcome.status = reply.status_code
      if reply.status_code == 200:
        tree = reply.json()
        outcome.answer = [[c["text"], c["finish_reason"]] for c in tree["choices"]]
        outcome.tokens = tree["usage"]["completion_tokens"]
    else:
      await ask_streamed(client, body, outcome, begin, cancel)
  except (httpx.HTTPError, ValueError, KeyError) as error:
    print(f"a request failed: {error!r}", file=sys.stderr)
  outcome.seconds = time.perf_counter() - begin
  return outcome


async def send(client: httpx.AsyncClient, content: bytes) -> Outcome:
  """A body as it is."""
  outcome, begin = Outcome(), time.perf_counter()
  try:
    outcome.status = (await client.post("/v1/completions", content=content)).status_code
  except httpx.HTTPError as error:
    print(f"a request failed: {error!r}", file=sys.stderr)
  outcome.seconds = time.perf_counter() - begin
  return outcome


async def ask_streamed(client, body: dict, outcome: Outcome, begin: float, cancel: bool):
  body = {**body, "stream_options": {"include_usage": True}}
  answers: dict[int, list] = {}
  whole = False
  async with client.stream("POST", "/v1/completions", json=body) as reply:
    outcome.status = reply.status_code
    async for line in reply.aiter_lines():
      data = line.removeprefix("data: ")
      whole = whole or data == "[DONE]"
      if not data.startswith("{"):
        continue
      if outcome.first is None:
        outcome.first = time.perf_counter() - begin
      if cancel:
        return
      tree = json.loads(data)
      for choice in tree["choices"]:
        answer = answers.setdefault(choice["index"], ["", None])
        answer[0] += choice["text"]
        answer[1] = choice["finish_reason"] or answer[1]
      if tree.get("usage"):
        outcome.tokens = tree["usage"]["completion_tokens"]
  if whole:
    outcome.answer = [answers[index] for index in sorted(answers)]


async def load(url: str, options: argparse.Namespace) -> dict:
  """Asks everything twice and compares; the numbers."""
  requests = valid_requests(options.requests, options.seed, options.max_tokens)
  limits = httpx.Limits(max_connections=options.clients)
  async with httpx.AsyncClient(base_url=url, timeout=options.timeout, limits=limits) as client:
    begin = time.perf_counter()
    alone = []
    for number, body in enumerate(requests, 1):
      alone.append(await ask(client, body))
      print(f"\rone by one: {number} of {len(requests)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    alone_seconds = time.perf_counter() - begin

    draw = random.Random(options.seed + 1)
    cancelled = set(draw.sample(range(len(requests)), len(requests) // 10))
    jobs = [("valid", number) for number in range(len(requests))]
    jobs += [("malformed", number % len(MALFORMED)) for number in range(options.malformed)]
    draw.shuffle(jobs)
    gate = asyncio.Semaphore(options.clients)

    async def one(kind: str, number: int) -> tuple[str, int, Outcome]:
      async with gate:
        if kind == "malformed":
          return kind, number, await send(client, MALFORMED[number][0])
        cancel = number in cancelled
        kind = "cancelled" if cancel else kind
        return kind, number, await ask(client, requests[number], cancel=cancel)

    begin = time.perf_counter()
    outcomes = await asyncio.gather(*(one(*job) for job in jobs))
    seconds = time.perf_counter() - begin
    idle = await until_idle(client)
  return report(alone, alone_seconds, outcomes, seconds, idle)


async def until_idle(client: httpx.AsyncClient, seconds: float = 30.0) -> bool:
  """Whether the server comes to rest: nothing waits, nothing is decoded, health is good."""
  deadline = time.perf_counter() + seconds
  while time.perf_counter() < deadline:
    health = (await client.get("/health")).json()
    if health == {"status": "ok", "waiting": 0, "active": 0}:
      return True
    await asyncio.sleep(0.05)
  return False


def report(alone, alone_seconds: float, outcomes, seconds: float, idle: bool) -> dict:
  valid = [(number, outcome) for kind, number, outcome in outcomes if kind == "valid"]
  malformed = [(number, outcome) for kind, number, outcome in outcomes if kind == "malformed"]
  times = sorted(outcome.seconds for _, outcome in valid)
  firsts = sorted(outcome.first for _, outcome in valid if outcome.first is not None)
  tokens = sum(outcome.tokens for _, outcome in valid)
  return {
    "valid": len(valid),
    "cancelled": sum(kind == "cancelled" for kind, _, _ in outcomes),
    "malformed": len(malformed),
    "lost": sum(outcome.answer is None for _, outcome in valid)
    + sum(outcome.answer is None for outcome in alone),
    "different": sum(outcome.answer != alone[number].answer for number, outcome in valid),
    "malformed_wrong": sum(outcome.status != MALFORMED[n][1] for n, outcome in malformed),
    "idle_at_end": idle,
    "seconds": round(seconds, 2),
    "seconds_one_by_one": round(alone_seconds, 2),
    "tokens": tokens,
    "tokens_per_second": round(tokens / seconds, 1),
    "tokens_per_second_one_by_one": round(sum(o.tokens for o in alone) / alone_seconds, 1),
    "p50_seconds": percentile(times, 0.5),
    "p95_seconds": percentile(times, 0.95),
    "p50_first_piece_seconds": percentile(firsts, 0.5),
  }


def percentile(values: list[float], share: float) -> float | None:
  return round(values[min(int(share * len(values)), len(values) - 1)], 3) if values else None


@contextlib.contextmanager
def own_server(options: argparse.Namespace) -> Iterator[str]:
  """A server in this process; its address."""
  import uvicorn

  from lladax.serve import Limits, Metrics, Scheduler, Served, make_app

  model = random_model() if options.random else load_model(options.model)
  length = min(model.config.max_position_embeddings, 512)
  served, metrics = Served(model=model, name="model", length=length), Metrics()
  served.check()
  scheduler = Scheduler(
    lambda config: model.engine(sampler=config, slots=options.slots, length=length),
    max_queue=4 * options.clients,
    context=model.on_mesh,
    metrics=metrics,
  )
  app = make_app(served, scheduler, metrics=metrics, limits=Limits(), warm_up=True)
  config = uvicorn.Config(app, port=0, log_level="error")
  server, listening = uvicorn.Server(config), config.bind_socket()
  thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
  thread.start()
  try:
    while thread.is_alive() and not server.started:
      time.sleep(0.05)
    if not server.started:
      raise RuntimeError("the server did not start; what it said is above")
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join()


def load_model(path: str):
  import lladax

  return lladax.load(path)


def random_model():
  """A tiny model with random weights that reads bytes."""
  import lladax
  from lladax.data import Bytes
  from lladax.infer import SamplerConfig
  from lladax.models import tiny
  from lladax.moe import MoEConfig

  text = Bytes()
  config = tiny(
    vocab_size=text.vocab_size,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=16),
    max_position_embeddings=128,
    initializer_range=0.3,  # far from uniform, so that answers differ
    mask_token_id=text.mask_id,
    eos_token_id=text.eos_id,
    pad_token_id=text.pad_id,
  )
  model = lladax.init(config, seed=0, tokenizer=text)
  model.sampler = SamplerConfig(gen_length=32, steps=16, block_length=16)
  return model


def check_local(url: str):
  """Raises ValueError for an address of another machine: this is no tool to strain others'."""
  host = urlsplit(url).hostname or ""
  if not all(info[4][0] in ("127.0.0.1", "::1") for info in socket.getaddrinfo(host, None)):
    raise ValueError(f"{url} is not on this machine; load tests stay at home")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--url", help="a server that runs on this machine")
  which.add_argument("--model", help="what to serve")
  which.add_argument("--random", action="store_true", help="serve a tiny model of random weights")
  parser.add_argument("--requests", type=int, default=200, help="valid ones")
  parser.add_argument("--malformed", type=int, default=20)
  parser.add_argument("--clients", type=int, default=32, help="requests at a time")
  parser.add_argument("--slots", type=int, default=8, help="answers decoded together")
  parser.add_argument("--max_tokens", type=int, default=32, help="most tokens of an answer")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--timeout", type=float, default=300.0, help="of a request, seconds")
  parser.add_argument("--json", help="file for the numbers")
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
  options = parse(arguments)
  if options.url:
    check_local(options.url)
    numbers = asyncio.run(load(options.url, options))
  else:
    with own_server(options) as url:
      numbers = asyncio.run(load(url, options))
  numbers["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
  for name, value in numbers.items():
    print(f"{name:>30}  {value}")
  if options.json:
    with open(options.json, "w", encoding="utf-8") as file:
      json.dump({**vars(options), **numbers}, file, indent=2)
  bad = ("lost", "different", "malformed_wrong")
  return int(any(numbers[name] for name in bad) or not numbers["idle_at_end"])


if __name__ == "__main__":
  sys.exit(main())
