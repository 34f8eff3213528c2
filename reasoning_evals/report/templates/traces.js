"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const names = Object.keys(data.experts);
const HUES = [210, 25, 140, 320, 55, 275, 175, 0, 95];
const chosen = new Set(names.filter((name) => data.experts[name] === "plan"));
if (!chosen.size && names.length) chosen.add(names[0]);
const shownMarks = new Set(["step end", "steered"]);
let traceNumber = 0, cursor = -1, spans = [], byToken = [], marksAt = [];
const element = (id) => document.getElementById(id);
const hue = (name) => HUES[names.indexOf(name) % HUES.length];
// So strong at most that the letters on it keep the contrast that readers need.
const band = (name, share) => `hsl(${hue(name)} 80% var(--band) / ${(0.12 + 0.5 * share).toFixed(3)})`;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// What no eye sees, and what would turn the reading direction, is shown as its code.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
    (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

function box(parent, label, on, colour, change) {
  const wrap = make("label", "choice");
  const input = make("input");
  input.type = "checkbox";
  input.checked = on;
  input.addEventListener("change", () => change(input.checked));
  wrap.append(input);
  if (colour !== null) {
    const dot = make("span", "dot");
    dot.style.background = `hsl(${colour} 80% var(--band))`;
    wrap.append(dot);
  }
  wrap.append(make("span", "", label));
  parent.append(wrap);
  return input;
}

const toggle = (set, name, on) => { if (on) set.add(name); else set.delete(name); paint(); };
const boxes = names.map((name, at) =>
  box(element("experts"), (at < 9 ? `${at + 1}: ` : "") + visible(`${name} (${data.experts[name]})`), chosen.has(name), hue(name),
    (on) => toggle(chosen, name, on)));
const allMarks = [...new Set(data.traces.flatMap((trace) => Object.keys(trace.marks)))];
allMarks.forEach((name) => box(element("marks"), visible(name), shownMarks.has(name), null, (on) => toggle(shownMarks, name, on)));
data.traces.forEach((trace, at) => {
  const option = make("option", "", visible(`${trace.arm}: ${trace.name}` + (trace.outcome ? ` (${trace.outcome})` : "")));
  option.value = at;
  element("trace").append(option);
});

function open(number) {
  if (number < 0 || number >= data.traces.length) return;
  traceNumber = number;
  element("trace").value = number;
  const trace = data.traces[number];
  const strongest = Math.max(1e-9, ...Object.values(trace.fired).flatMap((entry) => entry.weight));
  byToken = trace.tokens.map(() => []);
  marksAt = trace.tokens.map(() => []);
  for (const name of names) {
    const entry = trace.fired[name];
    if (entry) entry.at.forEach((at, i) => byToken[at].push([name, entry.weight[i], entry.weight[i] / strongest]));
  }
  for (const [name, places] of Object.entries(trace.marks)) places.forEach((at) => marksAt[at].push(name));
  const text = element("text");
  text.replaceChildren();
  spans = trace.tokens.map((token, at) => {
    const span = make("span", "", visible(token));
    span.dataset.at = at;
    if (at < trace.prompt_length) span.classList.add("prompt");
    if (trace.thought && at >= trace.thought[0] && at < trace.thought[1]) span.classList.add("thought");
    return span;
  });
  text.append(...spans);
  text.scrollTop = 0;
  cursor = -1;
  const thought = trace.thought ? trace.thought[1] - Math.max(trace.thought[0], 0) : 0;
  element("about").textContent = `${trace.tokens.length} tokens: ${trace.prompt_length} of the prompt (grey), ${thought} of the thought (plain), ` +
    "the rest of the answer (bold). Underlined in orange: marked; a green line above: the plan acted.";
  paint();
}

function paint() {
  spans.forEach((span, at) => {
    const bands = byToken[at].filter(([name]) => chosen.has(name));
    span.style.background = bands.length === 0 ? "" : bands.length === 1
      ? band(bands[0][0], bands[0][2])
      : "linear-gradient(" + bands.map(([name, , share], i) =>
        `${band(name, share)} ${100 * i / bands.length}% ${100 * (i + 1) / bands.length}%`).join(", ") + ")";
    span.classList.toggle("fires", bands.length > 0);
    span.classList.toggle("mark", marksAt[at].some((name) => shownMarks.has(name) && name !== "steered"));
    span.classList.toggle("steered", shownMarks.has("steered") && marksAt[at].includes("steered"));
  });
}

function point(at, scroll) {
  if (at < 0 || at >= spans.length) return;
  if (cursor >= 0) spans[cursor].classList.remove("cursor");
  cursor = at;
  spans[at].classList.add("cursor");
  if (scroll) spans[at].scrollIntoView({block: "nearest"});
  const fired = byToken[at].map(([name, weight]) => `${name} (${data.experts[name]}): ${weight.toFixed(3)}`);
  const marks = marksAt[at].length ? ` Marked: ${marksAt[at].join(", ")}.` : "";
  element("token").textContent = visible(`Token ${at} ${JSON.stringify(data.traces[traceNumber].tokens[at])}: ` +
    (fired.length ? fired.join("; ") : "none of the recorded experts") + "." + marks);
}

function seek(step) {
  for (let at = cursor + step; at >= 0 && at < spans.length; at += step)
    if (spans[at].classList.contains("fires")) { point(at, true); return; }
}

element("trace").addEventListener("change", (event) => open(Number(event.target.value)));
element("text").addEventListener("mouseover", (event) => { if (event.target.dataset.at) point(Number(event.target.dataset.at), false); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const moves = {ArrowRight: () => point(cursor + 1, true), ArrowLeft: () => point(cursor - 1, true),
    n: () => seek(1), p: () => seek(-1), j: () => open(traceNumber + 1), k: () => open(traceNumber - 1)};
  const number = Number(event.key);
  if (moves[event.key]) { moves[event.key](); event.preventDefault(); }
  else if (number >= 1 && boxes[number - 1]) boxes[number - 1].click();
});
open(0);
