"""The HTTP side: OpenAI's paths, a page that shows the denoising, health and metrics.

Whoever wants to see the denoising puts "frames": true into a request: every answer, and every piece
of a streamed one, then has a field "denoising" that tells for each token when it was written and
with which confidence.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import pathlib
import time
from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lladax.infer.replay import PLAYER, STYLE
from lladax.serve.metrics import Metrics
from lladax.serve.protocol import Ask, Limits, RequestError, parse_chat, parse_completion
from lladax.serve.scheduler import Job, QueueFull, Scheduler, Stopping
from lladax.serve.served import Served
from lladax.serve.writing import Rows, Style, chat_style, completion_style

DEFAULT_LIMITS = Limits()
GONE = 499  # nginx's status of a client that did not wait for its answer
PAGE = pathlib.Path(__file__).with_name("page.html")
# The page and what it does come in one piece and talk to this server only.
PAGE_POLICY = (
  "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Desk:
  """Takes requests in: who may ask, what is asked, and how it is answered.

  Attributes: see `make_app`.
  """

  served: Served
  scheduler: Scheduler
  metrics: Metrics
  limits: Limits
  api_key: str | None

  async def read(self, request: Request, parse: Callable[[object, Limits], Ask]) -> Ask:
    self.check_key(request)
    if not self.scheduler.alive:
      raise RequestError("the server is shutting down", status=503, code="unavailable")
    ask = parse(await read_json(request, self.limits.body_bytes), self.limits)
    if ask.model not in (None, self.served.name):
      raise RequestError(
        f"there is no model {ask.model!r} here; there is {self.served.name!r}",
        status=404,
        param="model",
        code="model_not_found",
      )
    return ask

  def check_key(self, request: Request):
    if self.api_key is None:
      return
    # Headers are bytes, which Starlette reads as Latin-1.
    given = request.headers.get("authorization", "").encode("latin-1")
    scheme, _, key = given.strip().partition(b" ")
    right = hmac.compare_digest(key.strip(), self.api_key.encode())
    if not (right and scheme.lower() == b"bearer"):
      raise RequestError(
        "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
        status=401,
        code="invalid_api_key",
      )

  async def answer(self, request: Request, ask: Ask, style: Style) -> Response:
    # Tokenizers take their time with a long text; the event loop has others to serve.
    rows = await asyncio.to_thread(self.submit, ask, asyncio.get_running_loop())
    if ask.stream:
      head = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
      stream = rows.stream(request, style)
      return StreamingResponse(stream, media_type="text/event-stream", headers=head)
    tree = await rows.whole(request, style)
    return JSONResponse(tree) if tree is not None else Response(status_code=GONE)

  def health(self) -> JSONResponse:
    alive, scheduler = self.scheduler.alive, self.scheduler
    tree = {
      "status": "ok" if alive else "stopping",
      "waiting": scheduler.waiting,
      "active": scheduler.active,
    }
    return JSONResponse(tree, status_code=200 if alive else 503)

  def submit(self, ask: Ask, loop: asyncio.AbstractEventLoop) -> Rows:
    config = self.served.config(ask)
    rows = Rows(ask, loop, self.scheduler.cancel, self.metrics)
    jobs: list[Job] = []
    for index, (made, answer, prompt) in enumerate(self.served.requests(ask, config, self.limits)):
      job = Job(config=config.program, request=made, listen=rows.listener(index))
      rows.add(job, answer, prompt)
      jobs.append(job)
    try:
      self.scheduler.submit(jobs)
    except QueueFull as error:
      raise RequestError(str(error), status=429, code="queue_full") from None
    except Stopping as error:
      raise RequestError(str(error), status=503, code="unavailable") from None
    return rows


def make_app(
  served: Served,
  scheduler: Scheduler,
  *,
  metrics: Metrics,
  limits: Limits = DEFAULT_LIMITS,
  api_key: str | None = None,
  drain_seconds: float = 30.0,
  warm_up: bool = False,
) -> FastAPI:
  """The application. It starts the scheduler and stops it when it is shut down.

  Args:
    api_key: asked of every client under /v1; None: of none.
    drain_seconds: time for answers that are being decoded when it is shut down.
    warm_up: whether an answer is decoded before the first request is taken, so that what most
      requests need is compiled. `app.state.ready`, where set, is called afterwards.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: FastAPI):
    scheduler.start()
    if warm_up:
      await served.warm_up(scheduler)
    if hasattr(app.state, "ready"):
      app.state.ready()
    yield
    await asyncio.to_thread(scheduler.stop, timeout=drain_seconds)

  # Without FastAPI's pages about the paths: they load scripts from elsewhere.
  app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

  desk = Desk(served=served, scheduler=scheduler, metrics=metrics, limits=limits, api_key=api_key)

  @app.post("/v1/completions")
  async def completions(request: Request):
    ask = await desk.read(request, parse_completion)
    return await desk.answer(request, ask, completion_style(served.name))

  @app.post("/v1/chat/completions")
  async def chat_completions(request: Request):
    ask = await desk.read(request, parse_chat)
    if served.model.conversation is None:
      raise RequestError(
        f"{served.name!r} has no chat template: it was trained on text; use /v1/completions",
        param="messages",
        code="no_chat_template",
      )
    return await desk.answer(request, ask, chat_style(served.name))

  @app.get("/v1/models")
  async def models(request: Request):
    desk.check_key(request)
    return {"object": "list", "data": [served.about()]}

  @app.get("/v1/models/{name:path}")
  async def model(request: Request, name: str):
    desk.check_key(request)
    if name != served.name:
      raise RequestError(f"there is no model {name!r}", status=404, code="model_not_found")
    return served.about()

  @app.get("/health")
  async def health():
    return desk.health()

  @app.get("/metrics")
  async def numbers():
    return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

  @app.get("/")
  async def page():
    return HTMLResponse(page_html(), headers={"Content-Security-Policy": PAGE_POLICY})

  add_errors(app)
  add_counting(app, metrics)
  return app


def page_html() -> str:
  """The page with the player of the replays in it."""
  text = PAGE.read_text(encoding="utf-8")
  parts = {"/* player.css */": STYLE, "/* player.js */": PLAYER}
  for mark, path in parts.items():
    text = text.replace(mark, path.read_text(encoding="utf-8"))
  return text


async def read_json(request: Request, most: int) -> object:
  """The body as JSON.

  Raises:
    RequestError: for one that is too long or is not JSON.
  """
  body = bytearray()
  async for piece in request.stream():
    body += piece
    if len(body) > most:
      raise RequestError(
        f"the body is longer than {most} bytes", status=413, code="request_too_large"
      )
  try:
    text = body.decode("utf-8-sig")
    tree = json.loads(text)
    if "\\ud" in text.lower():
      json.dumps(tree, ensure_ascii=False).encode()  # half of a pair of surrogates is no text
  except (ValueError, RecursionError) as error:
    raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None
  return tree


def add_errors(app: FastAPI):
  """Every error in OpenAI's form."""

  @app.exception_handler(RequestError)
  async def refused(_, error: RequestError):
    head = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.to_tree(), status_code=error.status, headers=head)

  @app.exception_handler(HTTPException)
  async def no_such_path(request: Request, error: HTTPException):
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    tree = RequestError(message, status=error.status_code, code=code).to_tree()
    return JSONResponse(tree, status_code=error.status_code, headers=error.headers)

  @app.exception_handler(ClientDisconnect)
  async def left(*_):
    return Response(status_code=GONE)  # in the middle of its request; for the metrics only

  @app.exception_handler(Exception)
  async def failed(_, error: Exception):
    # What went wrong is in the log; a client gets no look inside.
    tree = RequestError("the server failed on this request", status=500, code="failed").to_tree()
    return JSONResponse(tree, status_code=500)


class _Counting:
  """ASGI middleware that counts requests by path and status, streamed ones with their last byte."""

  def __init__(self, app, metrics: Metrics, paths: Sequence[str]):
    self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    begin, status = time.monotonic(), GONE

    async def noting(message):
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      await self._app(scope, receive, noting)
    except Exception:
      status = 500
      raise
    finally:
      path = scope["path"] if scope["path"] in self._paths else "other"
      self._metrics.answered(path, status, time.monotonic() - begin)


def add_counting(app: FastAPI, metrics: Metrics):
  paths = [getattr(route, "path", "") for route in app.routes]
  app.add_middleware(_Counting, metrics=metrics, paths=paths)
