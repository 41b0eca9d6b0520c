"""The page and the replays in a real browser."""

import contextlib
import os
import shutil
import threading

import pytest
from playwright.sync_api import sync_playwright
from running import KEY, Running, opened_later, until
from stand_in import written

from lladax.infer.earlier import EarlierText
from lladax.infer.engine import Request
from lladax.infer.replay import Replay, save_html
from lladax.serve import Ask

CHROMIUM = os.environ.get("CHROMIUM") or next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
  CHROMIUM is None, reason="no Chromium: install one, or name it in CHROMIUM"
)


@pytest.fixture(scope="module")
def browser():
  with sync_playwright() as playwright:
    options = ["--no-sandbox", "--disable-gpu"]
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
    yield browser
    browser.close()


@contextlib.contextmanager
def opened(browser, url):
  """A page that has asked nobody but its own server and has complained of nothing."""
  page = browser.new_page()
  asked, complaints = [], []
  page.on("request", lambda request: asked.append(request.url))
  page.on("pageerror", lambda error: complaints.append(str(error)))
  page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
  page.goto(url)
  yield page
  assert all(address.startswith(url) for address in asked), asked
  # What the server refuses, browsers tell as an error; the page shows it.
  assert not [text for text in complaints if "Failed to load resource" not in text], complaints
  page.close()


def expected(running, ids, count, seed, *, gap=None):
  config = running.served.config(Ask())
  if gap is None:
    request, first = Request(ids=ids, gen_length=count, seed=seed), len(ids)
  else:
    request, first = Request(ids=ids, seed=seed, infill=True), gap
  return bytes(written(request, config, first + i) for i in range(count)).decode()


@needs_browser
def test_the_page_shows_an_answer_crystallise(browser, text_model):
  with opened_later(threading.Semaphore(0)) as gate:
    with (
      Running(text_model, engine={"gate": gate}) as running,
      opened(browser, running.url) as page,
    ):
      page.wait_for_selector("#model:has-text('tiny')")
      assert page.locator("#mode option[value=chat]").is_disabled()
      page.fill("#prompt", "to be <b>")
      page.fill("#tokens", "16")
      page.fill("#seed", "3")
      page.click("#go")
      gate.release(1)
      until(lambda: page.locator(".canvas .written").count() == 8)
      text = expected(running, list(b"to be <b>"), 16, 3)
      assert page.locator(".canvas").text_content() == text[:8]
      assert page.locator(".you").inner_text() == "to be <b>"
      gate.release(1)
      page.wait_for_selector("section[data-done]")
      assert page.locator(".canvas").text_content() == text
      facts = page.locator(".facts").inner_text()
      assert "16 tokens in 4 passes, 4.00 per pass" in facts and "masked" not in facts
      shades = "[...document.querySelectorAll('.written')].map(s => getComputedStyle(s).color)"
      # The stand-in has two confidences, once they have faded in.
      until(lambda: len(set(page.evaluate(shades))) == 2)


@needs_browser
def test_the_page_fills_a_gap_and_shows_errors(browser, text_model):
  engine = {"breaks": [tuple(b"break")]}
  with Running(text_model, engine=engine) as running, opened(browser, running.url) as page:
    page.fill("#prompt", "left")
    page.fill("#suffix", "right")
    page.fill("#tokens", "6")
    page.fill("#seed", "1")
    page.click("#go")
    page.wait_for_selector("section[data-done]")
    row = [*b"left", *[257] * 6, *b"right"]
    assert page.locator(".canvas").text_content() == expected(running, row, 6, 1, gap=4)
    page.fill("#tokens", "65")
    page.click("#go")
    page.wait_for_selector("#error:has-text('max_tokens: expected a whole number from 1 to 64')")
    page.fill("#tokens", "8")
    page.fill("#suffix", "")
    page.fill("#prompt", "break")
    page.click("#go:enabled")
    page.wait_for_selector("#error:has-text('the server failed on this request')")  # in the stream


@needs_browser
def test_the_page_chats_with_a_key_and_stops(browser, paper_model):
  with opened_later(threading.Semaphore(0)) as gate:
    with (
      Running(paper_model, engine={"gate": gate}, api_key=KEY) as running,
      opened(browser, running.url) as page,
    ):
      page.fill("#key", KEY)
      page.dispatch_event("#key", "change")
      page.wait_for_selector("#model:has-text('tiny')")
      assert page.input_value("#mode") == "chat"
      gate.release(2)
      page.fill("#prompt", "hi")
      page.press("#prompt", "Control+Enter")
      page.wait_for_selector("section[data-done]")
      assert page.input_value("#prompt") == ""
      page.fill("#prompt", "again")
      page.click("#go")
      until(lambda: running.scheduler.active == 1)
      (row,) = running.engines[0].rows.values()
      conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": page.locator(".canvas").first.text_content()},
        {"role": "user", "content": "again"},
      ]
      assert row.request.ids == paper_model.chat_prompt(conversation)
      page.click("#stop")
      page.wait_for_selector("#error:has-text('Stopped.')")
      gate.release(1)
      until(lambda: running.metrics.value("cancelled_total") == 1)


@needs_browser
def test_a_replay_plays_without_a_network(browser, tmp_path):
  replay = Replay(
    texts=["<i>", "b", "c"],
    revealed_at=[1, 0, -1],
    confidence=[0.1, 0.9, 0.0],
    nfe=2,
    prompt="</p>",
    earlier=[EarlierText(place=0, at=0, text="<u>", confidence=0.5)],
  )
  save_html(tmp_path / "replay.html", [replay, replay])
  with opened(browser, f"file://{tmp_path}/replay.html") as page:
    first = page.locator(".replay").first
    assert first.locator(".canvas").text_content() == "<i>bc"
    assert first.locator(".prompt").text_content() == "</p>"
    states = []
    for number in range(3):
      first.locator("input").fill(str(number))
      spans = first.locator(".canvas span").all()
      states.append([span.get_attribute("class") for span in spans])
      assert spans[0].text_content() == ("<u>" if number == 1 else "<i>")
    assert states == [
      ["masked", "masked", "given"],
      ["written fresh", "written fresh", "given"],
      ["written fresh", "written", "given"],
    ]
    assert "iteration 2 of 2, 0 masked; 2 tokens in 2 passes" in first.inner_text()
    first.locator("button").click()
    first.locator("button:has-text('Pause')").wait_for()
    first.locator("button:has-text('Play')").wait_for()  # it has come to its end
