"""The server as clients see it: OpenAI's own client, plain HTTP, and what bad requests get."""

import concurrent.futures
import gc
import json
import socket
import threading

import httpx
import openai
import pytest
from running import KEY, Running, opened_later, until
from stand_in import written

from lladax.infer.engine import Request
from lladax.serve import Ask, Limits


@pytest.fixture(scope="module")
def server(paper_model):
  ends = {tuple(b"the end"): 5}
  with Running(paper_model, open_sampler=True, engine={"ends": ends}) as running:
    yield running


@pytest.fixture(scope="module")
def client(server):
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
    yield made


def expected(server, prompt: str, *, count=16, seed=0, **changes):
  ids = list(prompt.encode())
  config = server.served.config(changes.pop("ask", None) or Ask())
  request = Request(ids=ids, gen_length=-(-count // 8) * 8, seed=seed, **config.drawing)
  return bytes(written(request, config, len(ids) + i) for i in range(count)).decode()


def test_the_model_is_listed(client, server):
  (model,) = client.models.list().data
  assert model.id == "tiny" and model.owned_by == "lladax" and model.context_length == 96
  assert client.models.retrieve("tiny").chat is True
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve("gpt")


def test_a_completion(client, server):
  made = client.completions.create(model="tiny", prompt="hello", max_tokens=11, seed=3)
  (choice,) = made.choices
  assert choice.text == expected(server, "hello", count=11, seed=3)
  assert choice.finish_reason == "length"
  assert made.usage.prompt_tokens == 5 and made.usage.completion_tokens == 11
  assert made.usage.forward_passes == 4 and made.object == "text_completion"
  type(made).model_validate(made.model_dump())  # every field is there and of its type


def test_an_answer_ends_at_end_of_text(client):
  made = client.completions.create(model="tiny", prompt="the end", seed=0)
  assert made.choices[0].finish_reason == "stop" and len(made.choices[0].text) == 5


def test_a_stop_string_ends_the_answer_and_spares_the_rest(paper_model):
  with opened_later(threading.Semaphore(0)) as gate:
    with Running(paper_model, engine={"gate": gate}) as running:
      whole = expected(running, "stop", count=64)
      body = {"prompt": "stop", "seed": 0, "stop": whole[4:6], "max_tokens": 64}
      gate.release(1)
      reply = httpx.post(f"{running.url}/v1/completions", json=body).json()
      (choice,) = reply["choices"]
      assert (
        choice["text"] == whole[: whole.index(whole[4:6])] and choice["finish_reason"] == "stop"
      )
      gate.release(1)  # the block that was being decoded meanwhile
      until(lambda: running.metrics.value("cancelled_total") == 1)
      assert running.engines[0].steps <= 2


def test_several_prompts_and_answers_each_with_a_seed(client, server):
  made = client.completions.create(model="tiny", prompt=["a", "b"], n=2, seed=5, temperature=1.0)
  assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
  warm = Ask(temperature=1.0)
  assert [choice.text for choice in made.choices] == [
    expected(server, prompt, seed=5 + i, ask=warm) for i, prompt in enumerate("aabb")
  ]
  assert made.usage.prompt_tokens == 2 and made.usage.completion_tokens == 64


def test_without_a_seed_answers_differ(client):
  made = client.completions.create(model="tiny", prompt="a", n=2)
  again = client.completions.create(model="tiny", prompt="a", n=2)
  assert len({choice.text for choice in [*made.choices, *again.choices]}) >= 2


def test_a_suffix_makes_a_gap_to_fill(client, server):
  made = client.completions.create(
    model="tiny", prompt="left", suffix="right", max_tokens=6, seed=1
  )
  row = [*b"left", *[257] * 6, *b"right"]
  config = server.served.config(Ask())
  request = Request(ids=row, seed=1, infill=True)
  assert made.choices[0].text == bytes(written(request, config, 4 + i) for i in range(6)).decode()
  assert made.usage.prompt_tokens == 9 and made.usage.completion_tokens == 6


def test_a_stream_is_the_answer_in_pieces(client, server):
  stream = client.completions.create(
    model="tiny", prompt="hello", seed=3, stream=True, stream_options={"include_usage": True}
  )
  chunks = list(stream)
  texts = [choice.text for chunk in chunks for choice in chunk.choices]
  assert "".join(texts) == expected(server, "hello", seed=3)
  assert [len(text) for text in texts] == [8, 8]  # a block each
  assert [c.finish_reason for chunk in chunks for c in chunk.choices] == [None, "length"]
  assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 16
  assert {chunk.usage for chunk in chunks[:-1]} == {None}
  assert len({chunk.id for chunk in chunks}) == 1


def test_chat(client, server, paper_model):
  messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
  made = client.chat.completions.create(model="tiny", messages=messages, seed=2)
  ids = paper_model.chat_prompt(messages)
  request, config = Request(ids=ids, gen_length=16, seed=2), server.served.config(Ask())
  text = bytes(written(request, config, len(ids) + i) for i in range(16)).decode()
  assert made.choices[0].message.content == text and made.choices[0].message.role == "assistant"
  type(made).model_validate(made.model_dump())
  stream = client.chat.completions.create(model="tiny", messages=messages, seed=2, stream=True)
  chunks = [type(chunk).model_validate(chunk.model_dump()) for chunk in stream]
  deltas = [chunk.choices[0].delta for chunk in chunks]
  assert deltas[0].role == "assistant"
  assert "".join(delta.content or "" for delta in deltas) == text


def test_frames_tell_when_each_token_was_written(client, server):
  made = client.completions.create(
    model="tiny", prompt="hello", seed=3, extra_body={"frames": True}
  )
  (choice,) = made.choices
  frames = choice.denoising
  assert "".join(frames["texts"]) == choice.text
  assert frames["revealed_at"] == [
    block + column % 2 for block in (0, 2) for column in range(5, 13)
  ]
  assert frames["nfe"] == 4 and len(frames["confidence"]) == 16
  stream = client.completions.create(
    model="tiny", prompt="hello", seed=3, stream=True, extra_body={"frames": True}
  )
  pieces = [chunk.choices[0].denoising for chunk in stream]
  assert [piece["first"] for piece in pieces] == [0, 8]
  for name in ("texts", "revealed_at", "confidence", "tokens"):
    assert sum((piece[name] for piece in pieces), []) == frames[name]


def test_a_request_may_set_the_sampler_where_the_server_lets_it(client, server, paper_model):
  made = client.completions.create(
    model="tiny", prompt="hello", seed=3, stream=True,
    extra_body={"sampler": {"block_length": 4, "steps": 4}},
  )  # fmt: skip
  assert [len(chunk.choices[0].text) for chunk in made] == [4, 4, 4, 4]
  with pytest.raises(openai.BadRequestError, match="sampler: .*block_lengt"):
    client.completions.create(model="tiny", prompt="a", extra_body={"sampler": {"block_lengt": 4}})
  with pytest.raises(openai.BadRequestError, match="not a multiple of block_length 7"):
    client.completions.create(model="tiny", prompt="a", extra_body={"sampler": {"block_length": 7}})
  with Running(paper_model) as strict:
    reply = httpx.post(
      f"{strict.url}/v1/completions", json={"prompt": "a", "sampler": {"steps": 8}}
    )
    assert reply.status_code == 400 and "--open_sampler" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
  "path, body, status, message",
  [
    ("completions", b"{", 400, "the body is not JSON"),
    ("completions", b"[" * 100_000, 400, "the body is not JSON"),
    ("completions", b"\xff\xfe", 400, "the body is not JSON"),
    ("completions", b"", 400, "the body is not JSON"),
    ("completions", b'{"\\ud800": 1}', 400, "the body is not JSON"),  # half of a character
    ("completions", b'{"prompt": "\xed\xa0\x80"}', 400, "the body is not JSON"),
    ("completions", b'"a"', 400, "the body is a JSON object"),
    ("completions", b"{}", 400, "prompt is missing"),
    ("completions", b'{"prompt": "%s"}' % (b"a" * (1 << 20)), 413, "longer than 1048576 bytes"),
    ("completions", b'{"prompt": "%s"}' % (b"a" * 90), 400, "the prompt has 90 and max_tokens is"),
    ("completions", b'{"prompt": [257]}', 400, "id 257 is MASK"),
    ("completions", b'{"prompt": [300]}', 400, "outside the vocabulary of 300"),
    ("completions", b'{"prompt": [0]}', 400, "takes no prompt that begins with 0"),
    ("completions", b'{"prompt": "a", "model": "gpt"}', 404, "there is no model 'gpt' here"),
    ("chat/completions", b'{"messages": []}', 400, "messages: expected at least one"),
    ("chat/completions", b'{"messages": [{"role": "x", "content": "a"}]}', 400, "got 'x'"),
    ("chat/completions", b'{"messages": [{"role": "user"}]}', 400, "content: expected text"),
    ("embeddings", b"{}", 404, "Not Found"),
    ("models", b"{}", 405, "Method Not Allowed"),
  ],
)
def test_bad_requests_get_an_error_as_openai_writes_it(server, path, body, status, message):
  reply = httpx.post(f"{server.url}/v1/{path}", content=body)
  assert reply.status_code == status
  error = reply.json()["error"]
  assert message in error["message"] and error.keys() == {"message", "type", "param", "code"}
  assert "Traceback" not in reply.text


def test_a_body_is_refused_as_soon_as_it_is_too_long(server):
  def endless():
    for _ in range(10_000):
      yield b" " * (1 << 16)

  try:
    status = httpx.post(f"{server.url}/v1/completions", content=endless()).status_code
  except httpx.TransportError:  # closed while we were still sending
    status = 413
  assert status == 413
  assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_a_model_without_a_template_does_not_chat(text_model):
  with Running(text_model) as running:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    reply = httpx.post(f"{running.url}/v1/chat/completions", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "no_chat_template"


def test_a_key_is_asked_for(paper_model):
  with Running(paper_model, api_key=KEY) as running:
    for key, allowed in (
      (f"Bearer {KEY}", True), (f"bearer {KEY}", True), (KEY, False), ("Bearer another", False),
      ("Bearer é", False), ("Bearer", False), ("", False),
    ):  # fmt: skip
      head = {"Authorization": key.encode()}
      body = {"prompt": "a"}
      reply = httpx.post(f"{running.url}/v1/completions", json=body, headers=head)
      assert reply.status_code == (200 if allowed else 401), key
      reply = httpx.get(f"{running.url}/v1/models", headers=head)
      assert reply.status_code == (200 if allowed else 401)
    with pytest.raises(openai.AuthenticationError):
      openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0).models.list()
    assert httpx.get(f"{running.url}/health").status_code == 200
    assert httpx.post(f"{running.url}/v1/completions", json={}).status_code == 401
  with Running(paper_model, api_key="clé") as running:
    head = {"Authorization": "Bearer clé".encode()}
    assert httpx.get(f"{running.url}/v1/models", headers=head).status_code == 200


def test_a_full_queue_says_so_and_nothing_is_lost(paper_model):
  with opened_later(threading.Semaphore(0)) as gate:
    engine = {"slots": 1, "gate": gate}
    with Running(paper_model, engine=engine, max_queue=2) as running:
      url = f"{running.url}/v1/completions"
      with concurrent.futures.ThreadPoolExecutor(3) as pool:

        def ask(prompt):
          return httpx.post(url, json={"prompt": prompt, "seed": 1}, timeout=30)

        waiting = [pool.submit(ask, "a")]
        until(lambda: running.scheduler.active == 1)
        waiting += [pool.submit(ask, prompt) for prompt in "bc"]
        until(lambda: running.scheduler.waiting == 2)
        refused = httpx.post(url, json={"prompt": "d"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        gate.release(1000)
        texts = [reply.result().json()["choices"][0]["text"] for reply in waiting]
      assert texts == [expected(running, prompt, seed=1) for prompt in "abc"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_forgotten(paper_model, stream, caplog):
  with opened_later(threading.Semaphore(0)) as gate:
    with Running(paper_model, engine={"slots": 1, "gate": gate}) as running:
      body = {"prompt": "a", "stream": stream, "max_tokens": 64}
      with pytest.raises(httpx.ReadTimeout):
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=0.5) as reply:
          reply.read()
      until(lambda: running.scheduler.active == 1)
      labels = {"endpoint": "/v1/completions", "status": "200" if stream else "499"}
      until(lambda: running.metrics.value("requests_total", **labels) == 1)
      gate.release(1)  # the block that was being decoded
      until(lambda: running.metrics.value("cancelled_total") == 1)
      assert running.scheduler.active == 0 and running.engines[0].steps == 1
      gc.collect()
      assert "Task was destroyed" not in caplog.text


def test_who_hangs_up_in_the_middle_of_a_request_is_no_failure(paper_model, caplog):
  with Running(paper_model) as running:
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
      client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    labels = {"endpoint": "/v1/completions", "status": "499"}
    until(lambda: running.metrics.value("requests_total", **labels) == 1)
  assert "Traceback" not in caplog.text


def test_who_hangs_up_while_his_prompt_is_read_is_forgotten(paper_model):
  reading, read = threading.Event(), threading.Event()

  def requests(*args):
    reading.set()
    assert read.wait(20)
    return made(*args)

  with opened_later(threading.Semaphore(0)) as gate:
    with Running(paper_model, engine={"gate": gate}) as running:
      made = running.served.requests
      object.__setattr__(running.served, "requests", requests)
      body = {"prompt": "a", "stream": True, "max_tokens": 64}
      with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/completions", json=body, timeout=0.3)
      assert reading.wait(20)
      read.set()
      until(lambda: running.metrics.value("request_seconds_count", endpoint="/v1/completions") == 1)
      gate.release(1)  # the block that may have been begun
      until(lambda: running.metrics.value("cancelled_total") == 1)


def test_a_failure_inside_is_a_plain_500(paper_model):
  with Running(paper_model, engine={"breaks": [tuple(b"break")]}) as running:
    url = f"{running.url}/v1/completions"
    reply = httpx.post(url, json={"prompt": "break"})
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "the server failed on this request"
    with httpx.stream("POST", url, json={"prompt": "break", "stream": True}) as streamed:
      (event,) = [line for line in streamed.iter_lines() if line]
    assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"
    assert httpx.post(url, json={"prompt": "a"}).status_code == 200


def test_ending_waits_for_the_answers_that_have_begun(paper_model):
  with opened_later(threading.Semaphore(0)) as gate:
    with Running(paper_model, engine={"gate": gate}) as running:
      with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(
          httpx.post, f"{running.url}/v1/completions", json={"prompt": "a", "seed": 1}, timeout=30
        )
        until(lambda: running.scheduler.active == 1)
        running.stop()
        until(lambda: not accepts(running.url))
        gate.release(1000)
        assert reply.result().json()["choices"][0]["text"] == expected(running, "a", seed=1)
    assert not running.scheduler.alive


def accepts(url) -> bool:
  try:
    httpx.get(f"{url}/health")
  except httpx.TransportError:
    return False
  return True


def test_ending_does_not_wait_for_ever(paper_model):
  with opened_later(threading.Semaphore(0)) as gate:
    with Running(paper_model, engine={"gate": gate}, drain=1) as running:
      with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(
          httpx.post, f"{running.url}/v1/completions", json={"prompt": "a"}, timeout=30
        )
        until(lambda: running.scheduler.active == 1)
        running.stop()
        until(lambda: not accepts(running.url))
        failure = reply.exception()
        assert failure is not None or reply.result().status_code in (499, 500, 503)
        gate.release(1)


def test_health_and_metrics(server):
  assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "waiting": 0, "active": 0}
  httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
  httpx.get(f"{server.url}/nowhere")
  text = httpx.get(f"{server.url}/metrics").text
  assert 'lladax_requests_total{endpoint="/v1/completions",status="200"}' in text
  assert 'lladax_requests_total{endpoint="other",status="404"}' in text
  assert "# TYPE lladax_request_seconds histogram" in text


def test_the_page_is_in_one_piece(server):
  reply = httpx.get(server.url)
  assert reply.status_code == 200 and "default-src 'none'" in reply.headers[
    "content-security-policy"
  ]  # fmt: skip
  for reference in ("src=", "href=", "http://", "https://", "@import", "url("):
    assert reference not in reply.text
  assert "denoisingCanvas" in reply.text and "/* player" not in reply.text


def test_an_answer_is_decoded_before_anybody_asks(paper_model):
  with Running(paper_model, warm_up=True) as running:
    assert running.engines[0].steps == 2 and not running.engines[0].rows


def test_without_a_number_an_answer_is_as_long_as_there_is_room(server, client):
  for prompt, count in (("a" * 70, 16), ("a" * 85, 8)):  # the context is 96, a block 8
    made = client.completions.create(model="tiny", prompt=prompt)
    assert made.usage.completion_tokens == count
  with pytest.raises(openai.BadRequestError, match="at most 8 fit beside it"):
    client.completions.create(model="tiny", prompt="a" * 85, max_tokens=9)


def test_limits_are_the_servers(paper_model):
  limits = Limits(max_tokens=4, rows=2, body_bytes=100)
  with Running(paper_model, limits=limits) as running:
    for body, status in (
      ({"prompt": "a", "max_tokens": 5}, 400), ({"prompt": "a", "n": 3}, 400),
      ({"prompt": "a" * 100}, 413), ({"prompt": "a", "max_tokens": 4}, 200),
    ):  # fmt: skip
      assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == status
    reply = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a"}).json()
    assert reply["usage"]["completion_tokens"] == 4  # and not the sampler's 16
