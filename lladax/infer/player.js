"use strict";

// Tokens as spans: bars while they are masked, then text coloured by confidence from red (0) to
// green (1). A column is {text, at, confidence, earlier}: `at` is the iteration that writes it, -1
// where it was given, Infinity while nobody knows; `earlier` is what was there before it, each with
// its {text, at, confidence}, text null where it was masked again. Text is set as text only, never
// as markup.
function denoisingCanvas() {
  const root = document.createElement("div");
  root.className = "canvas";
  const columns = [], spans = [];
  let shown = 0;

  // What a column shows now; null for a mask.
  function now(column) {
    if (column.at < shown) return column;
    const before = column.earlier.filter(one => one.at < shown).pop();
    return before && before.text !== null ? before : null;
  }

  function draw(i) {
    const seen = now(columns[i]), span = spans[i], masked = !seen;
    const { text, at, confidence } = seen || columns[i];
    span.textContent = text;
    span.className = masked ? "masked" : at < 0 ? "given" : "written";
    if (at >= 0 && at === shown - 1) span.classList.add("fresh");
    span.style.setProperty("--hue", String(Math.round(120 * Math.max(0, Math.min(1, confidence)))));
    span.title = masked || at < 0 ? "" :
      `token ${i}, written in iteration ${at} with confidence ${confidence.toFixed(2)}`;
  }

  return {
    root,
    // Puts columns from `first` on, adding spans where there are none yet.
    put(first, more) {
      more.forEach((column, k) => {
        const i = first + k;
        while (spans.length <= i) {
          columns.push({ text: "\u2591", at: Infinity, confidence: 0, earlier: [] });
          spans.push(root.appendChild(document.createElement("span")));
          draw(spans.length - 1);
        }
        columns[i] = column;
        draw(i);
      });
    },
    // Shows the canvas as it was before iteration `number`.
    show(number) {
      const [low, high] = [Math.min(shown, number) - 1, Math.max(shown, number)];
      shown = number;
      const changes = one => one.at >= low && one.at <= high;
      columns.forEach((column, i) => {
        if (changes(column) || column.earlier.some(changes)) draw(i);
      });
    },
    // Takes columns away from `length` on: what follows the end of an answer.
    cut(length) {
      columns.length = Math.min(columns.length, length);
      while (spans.length > columns.length) spans.pop().remove();
    },
    clear() { this.cut(0); shown = 0; },
    get shown() { return shown; },
    get masked() { return columns.filter(column => !now(column)).length; },
    get text() { return columns.map(column => (now(column) || { text: "\u2591" }).text).join(""); },
  };
}

function columnsOf(replay) {
  const columns = replay.texts.map((text, i) =>
    ({ text, at: replay.revealed_at[i], confidence: replay.confidence[i], earlier: [] }));
  for (const one of replay.earlier) columns[one.place].earlier.push(one);
  return columns;
}

// A finished replay with a button and a slider.
function replayPlayer(replay) {
  const root = document.createElement("section");
  root.className = "replay";
  if (replay.prompt) {
    const prompt = root.appendChild(document.createElement("div"));
    prompt.className = "prompt";
    prompt.textContent = replay.prompt;
  }
  const canvas = denoisingCanvas();
  canvas.put(0, columnsOf(replay));
  root.append(canvas.root);
  const last = replay.revealed_at.reduce((most, at) => Math.max(most, at), -1) + 1;
  const written = replay.revealed_at.filter(at => at >= 0).length;
  const controls = root.appendChild(document.createElement("div"));
  controls.className = "controls";
  const button = controls.appendChild(document.createElement("button"));
  const slider = controls.appendChild(document.createElement("input"));
  Object.assign(slider, { type: "range", min: 0, max: last, value: last });
  slider.setAttribute("aria-label", "iteration");
  const facts = controls.appendChild(document.createElement("span"));
  facts.className = "facts";
  let timer = null;

  function show(number) {
    slider.value = number;
    canvas.show(number);
    facts.textContent = `iteration ${number} of ${last}, ${canvas.masked} masked; ` +
      `${written} tokens in ${replay.nfe} passes`;
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  }
  function play() {
    let number = Number(slider.value) >= last ? 0 : Number(slider.value);
    show(number);
    button.textContent = "Pause";
    timer = setInterval(() => {
      if (number >= last) stop();
      else show(++number);
    }, Math.max(30, Math.min(250, 6000 / Math.max(last, 1))));
  }
  button.addEventListener("click", () => timer ? stop() : play());
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  stop();
  show(last);
  return root;
}
