"use strict";
// Shows the samples. All text goes in as textContent; nothing is fetched.
const { models, marks, samples } = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const list = get("list"), detail = get("detail");
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const FPS = 2;
let shown = [], chosen = -1, timer = 0, flip = null;

function make(tag, className, text, parent) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

const keyOf = (sample, number) => `${sample.video}/${sample.id}/${number}`;
const right = (answer, mark) => (answer && mark in answer.marks ? answer.marks[mark] : null);
const address = (name) => {
  const part = get(name);
  return part && part.type === "text/plain" ? "data:" + part.textContent : name;
};

// --- filters

function fill(select, values) {
  for (const value of values) make("option", "", value, select).value = value;
}

function showFilters() {
  const several = (field) => [...new Set(samples.map((sample) => sample[field]))].filter(Boolean).sort();
  fill(get("type"), several("type"));
  fill(get("video"), several("video"));
  fill(get("mark"), marks);
  get("video").parentElement.hidden = several("video").length < 2;
  for (const label of document.querySelectorAll(".judged")) label.hidden = !marks.length;
  const choices = [["right", models.length > 1 ? "all right" : "right"], ["wrong", models.length > 1 ? "all wrong" : "wrong"]];
  if (models.length > 1) {
    choices.push(["flipped", "models differ"]);
    models.forEach((model, number) => choices.push([`wrong ${number}`, `wrong: ${model}`]));
  }
  choices.push(["notes", "with notes"]);
  for (const [value, text] of choices) make("option", "", text, get("right")).value = value;
}

function fits(sample, wanted) {
  if (wanted.type && sample.type !== wanted.type) return false;
  if (wanted.video && sample.video !== wanted.video) return false;
  if (wanted.right === "notes" && !sample.notes.length) return false;
  if (wanted.right && wanted.right !== "notes") {
    const judged = sample.answers.map((answer) => right(answer, wanted.mark));
    const known = judged.filter((value) => value !== null);
    if (!known.length) return false;
    if (wanted.right === "right" && !known.every(Boolean)) return false;
    if (wanted.right === "wrong" && known.some(Boolean)) return false;
    if (wanted.right === "flipped" && new Set(known).size < 2) return false;
    if (wanted.right.startsWith("wrong ") && judged[Number(wanted.right.slice(6))] !== false) return false;
  }
  if (!wanted.search) return true;
  const texts = [sample.id, sample.video, sample.question, sample.label, sample.reference, ...sample.answers.map((a) => (a ? a.text : ""))];
  return texts.some((text) => text.toLowerCase().includes(wanted.search));
}

function showList() {
  const wanted = { type: get("type").value, video: get("video").value, right: get("right").value, mark: get("mark").value,
    search: get("search").value.trim().toLowerCase() };
  const before = shown[chosen];
  shown = samples.map((sample, number) => ({ sample, number })).filter(({ sample }) => fits(sample, wanted));
  get("count").textContent = shown.length === samples.length ? `${samples.length} samples` : `${shown.length} of ${samples.length} samples`;
  list.replaceChildren(...shown.map(({ sample, number }, place) => {
    const row = make("div", "row");
    row.id = `row${number}`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", "false");
    const top = make("div", "top", undefined, row);
    make("span", "", sample.video ? `${sample.video} · ${sample.id}` : sample.id, top);
    make("span", "", sample.type, top);
    const verdicts = make("span", "", undefined, top);
    for (const answer of sample.answers) {
      const value = right(answer, wanted.mark);
      make("span", value === null ? "" : value ? "yes" : "no", value === null ? "·" : value ? "✓" : "✗", verdicts);
    }
    make("div", "what", sample.question || "(no question)", row);
    row.addEventListener("click", () => {
      choose(place);
      if (detail.offsetLeft === list.offsetLeft) detail.scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    });
    return row;
  }));
  const again = before ? shown.findIndex((entry) => entry.number === before.number) : -1;
  choose(again >= 0 ? again : 0);
}

// --- one sample

function choose(place) {
  stop();
  list.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
  chosen = shown.length ? Math.max(0, Math.min(place, shown.length - 1)) : -1;
  detail.replaceChildren();
  flip = null;
  if (chosen < 0) {
    list.removeAttribute("aria-activedescendant");
    make("p", "muted", "No sample fits the filters.", detail);
    return;
  }
  const { sample, number } = shown[chosen], row = get(`row${number}`);
  row.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", row.id);
  if (row.offsetTop < list.scrollTop + list.offsetTop || row.offsetTop + row.offsetHeight > list.scrollTop + list.offsetTop + list.clientHeight)
    list.scrollTop = row.offsetTop - list.offsetTop - list.clientHeight / 2;
  history.replaceState(null, "", "#" + encodeURIComponent(keyOf(sample, number)));
  show(sample);
}

function show(sample) {
  make("p", "question", sample.question || "(no question)", detail);
  showFrames(sample);
  if (sample.sound) {
    const audio = make("audio", "", undefined, detail);
    audio.controls = true;
    audio.preload = "none";
    audio.src = address(sample.sound);
    audio.setAttribute("aria-label", "the spoken question");
  }
  const facts = make("p", "", undefined, detail);
  for (const text of [sample.type, sample.video && `video ${sample.video}`, sample.id]) if (text) make("span", "tag", text, facts);
  const truth = make("p", "", "label ", detail);
  make("strong", "", sample.label || "none", truth);
  if (sample.reference) make("span", "muted", ` — ${sample.reference}`, truth);
  const answers = make("div", "answers", undefined, detail);
  sample.answers.forEach((answer, number) => {
    const box = make("div", "answer", undefined, answers);
    make("div", "by", models[number] + (answer && answer.ms !== undefined ? ` · ${answer.ms} ms` : ""), box);
    make("div", answer ? "said" : "said muted", answer ? answer.text || "(nothing)" : "not asked", box);
    for (const mark of marks) {
      const value = right(answer, mark);
      if (value !== null) make("span", `tag ${value ? "yes" : "no"}`, `${value ? "✓" : "✗"} ${mark}`, box);
    }
  });
  for (const note of sample.notes) make("p", "warning", note, detail);
}

function showFrames(sample) {
  const count = sample.frames.length;
  if (!count) return;
  if (!sample.strip && !sample.urls) {
    make("p", "muted", `${count} frames, not shown`, detail);
    return;
  }
  const stage = make("div", "stage", undefined, detail);
  stage.setAttribute("role", "img");
  stage.style.aspectRatio = String(sample.ratio || 4 / 3);
  if (sample.strip) {
    stage.style.backgroundImage = `url(${address(sample.strip)})`;
    stage.style.backgroundSize = `${100 * count}% 100%`;
  }
  const player = make("div", "player", undefined, detail);
  const button = make("button", "", "Play", player);
  button.type = "button";
  button.addEventListener("click", () => (timer ? stop() : play()));
  const slider = make("input", "", undefined, player);
  Object.assign(slider, { type: "range", min: 0, max: count - 1, value: 0 });
  slider.setAttribute("aria-label", "frame");
  const name = make("span", "name", "", player);
  flip = { count, at: 0, button, go(at) {
    flip.at = (at + count) % count;
    slider.value = flip.at;
    name.textContent = `${flip.at + 1} of ${count}: ${sample.frames[flip.at]}`;
    stage.setAttribute("aria-label", `frame ${name.textContent}`);
    if (sample.strip) stage.style.backgroundPosition = `${count > 1 ? (100 * flip.at) / (count - 1) : 0}% 0`;
    else stage.style.backgroundImage = sample.urls[flip.at] ? `url("${sample.urls[flip.at]}")` : "none";
  } };
  slider.addEventListener("input", () => { stop(); flip.go(Number(slider.value)); });
  flip.go(0);
  if (!calm && count > 1) play();
}

function play() {
  if (!flip) return;
  const book = flip;
  book.button.textContent = "Pause";
  timer = setInterval(() => book.go(book.at + 1), 1000 / FPS);
}

function stop() {
  clearInterval(timer);
  timer = 0;
  if (flip) flip.button.textContent = "Play";
}

// --- keys

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input, select, textarea, audio, button, summary");
  if (typing) {
    if (event.key === "Escape") list.focus();
    return;
  }
  const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
  if (step && !(Math.abs(step) > 1 && document.activeElement !== list)) choose(chosen + step);
  else if (event.key === "ArrowRight" && flip) { stop(); flip.go(flip.at + 1); }
  else if (event.key === "ArrowLeft" && flip) { stop(); flip.go(flip.at - 1); }
  else if (event.key === " " && flip) { if (timer) stop(); else play(); }
  else if (event.key === "a") { const audio = detail.querySelector("audio"); if (audio) { if (audio.paused) audio.play(); else audio.pause(); } }
  else if (event.key === "/") get("search").focus();
  else return;
  event.preventDefault();
});

showFilters();
for (const name of ["type", "video", "right", "mark"]) get(name).addEventListener("change", showList);
get("search").addEventListener("input", showList);
get("filters").addEventListener("submit", (event) => event.preventDefault());
showList();
const wanted = samples.findIndex((sample, number) => "#" + encodeURIComponent(keyOf(sample, number)) === location.hash);
if (wanted >= 0) choose(wanted);
list.focus({ preventScroll: true });
