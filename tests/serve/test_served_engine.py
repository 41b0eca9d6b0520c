"""The server over the real engine: answers are those of one request alone, whoever else asks."""

import concurrent.futures

import httpx
from running import Running

SHORT = {"max_tokens": 16}


def test_concurrent_answers_are_the_sequential_ones(text_model):
  bodies = [{"prompt": "to be" + "!" * (n % 3), "seed": n, **SHORT} for n in range(8)]
  bodies += [{"prompt": "ab", "suffix": "yz", "max_tokens": 5, "seed": n} for n in range(2)]
  bodies += [{"prompt": ["a", "b"], "temperature": 0.8, "seed": 1, "stream": False, **SHORT}]
  bodies += [{"prompt": "to be", "seed": 3, "n": 2, "temperature": 0.8, **SHORT}]

  def open_engine(config):
    return text_model.engine(sampler=config, slots=3, length=96)

  with Running(text_model, open_engine=open_engine, warm_up=True) as running:
    url = f"{running.url}/v1/completions"

    def ask(body):
      reply = httpx.post(url, json=body, timeout=60).json()
      return [(choice["text"], choice["finish_reason"]) for choice in reply["choices"]]

    alone = [ask(body) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
      together = list(pool.map(ask, bodies))
  assert together == alone
  assert len({text for answers in alone for text, _ in answers}) > 4


def test_a_served_answer_is_what_the_model_generates(text_model):
  def open_engine(config):
    return text_model.engine(sampler=config, slots=3, length=96)

  with Running(text_model, open_engine=open_engine) as running:
    url = f"{running.url}/v1/completions"
    served = httpx.post(url, json={"prompt": "to be", "seed": 3}, timeout=60).json()
  assert served["choices"][0]["text"] == text_model.generate("to be", seed=3)
