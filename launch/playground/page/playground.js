// The page: what may be chosen, what is chosen, and the run. Everything chosen is kept by the server under the name in the address.
import {Answer, legend, make, range, visible} from "./tokens.js";

const element = (id) => document.getElementById(id);
const own = new URL(location.href);
const page = own.searchParams.get("page") || Array.from(crypto.getRandomValues(new Uint8Array(9)), (n) => "abcdefghijkmnpqrstuvwxyz23456789"[n % 32]).join("");
own.searchParams.set("page", page);
history.replaceState(null, "", own);
const api = `/api/pages/${encodeURIComponent(page)}`;

let offer, settings, source = null, answers = [], keeping = 0, sent = "", ran = null;

async function ask(path, method = "GET", body) {
  const how = {method, headers: {}};
  if (body !== undefined) { how.headers["Content-Type"] = "application/json"; how.body = JSON.stringify(body); }
  let reply;
  try { reply = await fetch(path, how); } catch { throw new Error("the playground does not answer: see whether it still runs, then reload"); }
  const text = await reply.text();
  let values;
  try { values = JSON.parse(text); } catch { throw new Error(text.slice(0, 300) || `the playground answers ${reply.status}`); }
  if (!reply.ok) throw new Error(values.error || `the playground answers ${reply.status}`);
  return values;
}

function say(text, wrong = false) {
  element("said").textContent = visible(text);
  element("said").classList.toggle("wrong", wrong);
}

// What a field says; null where it is empty or no number: the server refuses that in a sentence, and nothing is rounded on the way.
const numberIn = (field) => (field.value.trim() === "" ? null : Number(field.value));

const attempt = (work) => async (...given) => { try { await work(...given); } catch (error) { say(error.message, true); } };

// Settings: kept a moment after the last change, and at once before a run.
function changed() {
  clearTimeout(keeping);
  keeping = setTimeout(attempt(keep), 250);
  tellStale();
}

async function keep() {
  clearTimeout(keeping);
  const text = JSON.stringify(settings);
  if (text === sent) return;
  await ask(api, "PUT", settings);
  sent = text;
}

const essence = (one) => JSON.stringify({...one, colour: ""});

// What is on the screen belongs to the settings of the run, and says so where they have changed since.
function tellStale() {
  element("stale").hidden = !ran || essence(settings) === essence(ran);
}

// Column of the run -> where it stands now: columns may have come and gone.
function places() {
  const free = new Set(settings.columns.keys()), found = [];
  ran.columns.forEach((column, at) => {
    const same = [...free].find((now) => JSON.stringify(settings.columns[now]) === JSON.stringify(column));
    if (same !== undefined) { found[at] = same; free.delete(same); }
  });
  ran.columns.forEach((_, at) => { if (found[at] === undefined && free.has(at)) { found[at] = at; free.delete(at); } });
  return found;
}

function options(select, names, chosen) {
  select.replaceChildren(...names.map((item) => {
    const [value, text] = Array.isArray(item) ? item : [item, item];
    const option = make("option", "", visible(text));
    option.value = value;
    return option;
  }));
  if (chosen !== undefined) select.value = chosen;
}

function usual() {
  const layers = offer.shape ? offer.shape.moe_layers : [];
  const middle = layers[Math.floor(layers.length / 2)];
  const plans = Object.keys(offer.remote ? offer.served : offer.plans), directions = Object.keys(offer.directions);
  const second = plans.length ? {kind: "plan", plan: plans[0], dose: 1} : directions.length ? direction(directions[0])
    : layers.length ? {kind: "plan", plan: "yours", dose: 1} : offer.remote ? {kind: "plain"} : {kind: "arm", word: "budget:64"};
  return {
    prompt: {index: 0}, sampling: {seed: 0, ...offer.sampling},
    plan: {base: null, experts: layers.length ? [{layer: middle, expert: 0, gain: 4}] : [], scope: "all", renormalize: false},
    columns: [{kind: "plain"}, second], colour: offer.remote ? "" : directions.length && !layers.length ? `projection:${offer.directions[directions[0]].layer ?? 0}:${directions[0]}` : "steered",
  };
}

const direction = (name) => ({kind: "direction", direction: name, layer: offer.directions[name].layer ?? 0, strength: offer.directions[name].unit === "vector" ? 1 : 0.3,
  unit: offer.directions[name].unit, scope: "all"});

// Prompt and sampling.
async function showProblem() {
  const index = settings.prompt.index;
  const fromTask = index !== undefined;
  element("from-task").checked = fromTask;
  element("from-text").checked = !fromTask;
  element("task-prompt").hidden = !fromTask;
  element("text-prompt").hidden = fromTask;
  if (!fromTask) { element("text").value = settings.prompt.text; element("own-target").value = settings.prompt.target; return; }
  element("problem").value = index + 1;
  const one = await ask(`/api/problems/${index}`);
  element("question").textContent = visible(one.prompt);
  element("target").textContent = `right answer: ${visible(one.target)}`;
}

function wirePrompt() {
  let words = settings.prompt.index === undefined ? settings.prompt : {text: "", target: ""}, index = settings.prompt.index ?? 0;
  const switchTo = attempt(async () => {
    settings.prompt = element("from-task").checked ? {index} : words;
    await showProblem();
    changed();
  });
  element("from-task").onchange = element("from-text").onchange = switchTo;
  element("problem").onchange = attempt(async () => {
    const asked = Math.round(Number(element("problem").value)) || 1;
    index = Math.min(Math.max(asked, 1), offer.problems.length) - 1;
    settings.prompt = {index};
    await showProblem();
    changed();
  });
  element("text").oninput = element("own-target").oninput = () => {
    words = settings.prompt = {text: element("text").value, target: element("own-target").value};
    changed();
  };
  const fields = {seed: "seed", temperature: "temperature", "top-p": "top_p", most: "max_new_tokens"};
  for (const [id, key] of Object.entries(fields)) {
    element(id).value = settings.sampling[key];
    element(id).onchange = () => { settings.sampling[key] = numberIn(element(id)); changed(); };
  }
  element("greedy").checked = settings.sampling.greedy;
  element("greedy").onchange = () => { settings.sampling.greedy = element("greedy").checked; changed(); };
  element("next-seed").onclick = () => { settings.sampling.seed += 1; element("seed").value = settings.sampling.seed; run(); };
}

// Your plan. An entry keeps whatever else a plan file says of an expert: it goes back to the reader of plans as it came.
const toSlider = (gain) => (gain > 0 ? Math.min(6, Math.max(-6, Math.log2(gain))) : -6);
const toGain = (place) => Number((2 ** place).toPrecision(3));

// A gate: in words, its condition, what its border is in words. Any other one, of a plan file, is kept as it is.
const GATES = {
  spent: ["the thought is long", {above: 60}, "tokens of thought, from"],
  entropy: ["it is unsure", {above: 1}, "entropy in nats, from"],
  margin: ["two tokens are close", {below: 0.2}, "difference of their shares, up to"],
  loop: ["it repeats itself", {above: 24}, "repeated tokens, from"],
  paragraphs_since: ["long since a Wait", {above: 2, word: "Wait"}, "paragraphs since, from"],
};

function planGate() {
  const [first, ...others] = new Set(settings.plan.experts.map((entry) => JSON.stringify(entry.when ?? null)));
  if (others.length) return "own";
  const when = JSON.parse(first ?? "null");
  if (!when) return null;
  const known = GATES[when.on] && {on: when.on, ...GATES[when.on][1]};
  return known && Object.keys(when).sort().join() === Object.keys(known).sort().join() && when.word === known.word ? when : "own";
}

const border = (when) => ("above" in when ? "above" : "below");

function setGate(when) {
  for (const entry of settings.plan.experts) { if (when) entry.when = structuredClone(when); else delete entry.when; }
  showPlan();
  changed();
}

function showGate() {
  const gate = planGate(), own = gate === "own";
  const words = [["", "always"], ...Object.entries(GATES).map(([on, [said]]) => [on, said]), ...(own ? [["own", "as each entry says"]] : [])];
  options(element("gate"), words, own ? "own" : gate?.on ?? "");
  element("gate").disabled = !settings.plan.experts.length;
  element("gate-wrap").hidden = own || !gate;
  if (gate && !own) {
    element("gate-words").textContent = GATES[gate.on][2];
    element("gate-border").value = gate[border(gate)];
  }
}

function showPlan() {
  showGate();
  element("plan-card").hidden = offer.remote || !offer.shape.moe_layers.length;
  const home = element("experts");
  home.replaceChildren();
  settings.plan.experts.forEach((entry, at) => {
    const row = element("expert-row").content.firstElementChild.cloneNode(true);
    const part = (name) => row.querySelector("." + name);
    options(part("layer"), offer.shape.moe_layers, entry.layer);
    part("number").value = entry.expert;
    part("number").max = offer.shape.num_experts - 1;
    part("gain").value = entry.gain;
    part("slider").value = toSlider(entry.gain);
    part("slider").setAttribute("aria-valuetext", `gain ${entry.gain}`);
    const more = Object.entries(entry).filter(([key]) => !["layer", "expert", "gain"].includes(key));
    part("also").textContent = visible(more.map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", "));
    part("layer").onchange = () => { entry.layer = Number(part("layer").value); changed(); };
    part("number").onchange = () => { entry.expert = numberIn(part("number")); changed(); };
    part("slider").oninput = () => { entry.gain = toGain(Number(part("slider").value)); part("gain").value = entry.gain; part("slider").setAttribute("aria-valuetext", `gain ${entry.gain}`); changed(); };
    part("gain").onchange = () => { entry.gain = numberIn(part("gain")); part("slider").value = toSlider(entry.gain); changed(); };
    part("remove").onclick = () => { settings.plan.experts.splice(at, 1); showPlan(); changed(); element("add-expert").focus(); };
    home.append(row);
  });
  if (!settings.plan.experts.length) home.append(make("p", "nothing", "No expert yet: add one here, or take one of a token's."));
  element("scope").value = settings.plan.scope;
  element("renormalize").checked = settings.plan.renormalize;
  element("base").value = settings.plan.base ?? "";
}

function addExpert(layer, expert) {
  const there = settings.plan.experts.find((entry) => entry.layer === layer && entry.expert === expert);
  if (there) { say(`layer ${layer} expert ${expert} is in your plan already`); return; }
  const gate = planGate();
  settings.plan.experts.push({layer, expert, gain: 4, ...(gate && gate !== "own" ? {when: structuredClone(gate)} : {})});
  showPlan();
  changed();
  say(`layer ${layer} expert ${expert} is in your plan now, with gain 4`);
}

function wirePlan() {
  if (offer.remote) return;
  options(element("scope"), [...new Set([...offer.scopes, settings.plan.scope])]);
  options(element("base"), [["", "nothing"], ...Object.keys(offer.plans)]);
  element("base-wrap").hidden = !Object.keys(offer.plans).length;
  element("base").onchange = () => {
    const name = element("base").value, plan = offer.plans[name];
    settings.plan = plan ? {base: name, experts: structuredClone(plan.experts), scope: plan.scope, renormalize: plan.renormalize}
      : {base: null, experts: [], scope: "all", renormalize: false};
    options(element("scope"), [...new Set([...offer.scopes, settings.plan.scope])]);
    showPlan();
    changed();
  };
  element("add-expert").onclick = () => {
    const layers = offer.shape.moe_layers, taken = new Set(settings.plan.experts.map((entry) => `${entry.layer}:${entry.expert}`));
    const layer = layers[Math.floor(layers.length / 2)];
    let expert = 0;
    while (taken.has(`${layer}:${expert}`) && expert < offer.shape.num_experts - 1) expert += 1;
    addExpert(layer, expert);
  };
  element("scope").onchange = () => { settings.plan.scope = element("scope").value; changed(); };
  element("gate").onchange = () => {
    const on = element("gate").value;
    if (on !== "own") setGate(on ? {on, ...GATES[on][1]} : null);
  };
  element("gate-border").onchange = () => {
    const gate = planGate();
    setGate({...gate, [border(gate)]: numberIn(element("gate-border"))});
  };
  element("renormalize").onchange = () => { settings.plan.renormalize = element("renormalize").checked; changed(); };
}

// Columns.
function kinds() {
  const found = [["plain", "Plain: the model as it is"]];
  if (!offer.remote && offer.shape.moe_layers.length) found.push(["plan:yours", "Your plan"]);
  for (const name of Object.keys(offer.remote ? offer.served : offer.plans)) found.push([`plan:${name}`, `${offer.remote ? "The server's plan" : "Plan file"}: ${name}`]);
  for (const name of Object.keys(offer.directions)) found.push([`direction:${name}`, `Direction: ${name}`]);
  if (!offer.remote) found.push(["arm", "A rule of the literature"]);
  return found;
}

const kindOf = (column) => (column.kind === "plan" ? `plan:${column.plan}` : column.kind === "direction" ? `direction:${column.direction}` : column.kind);

function showColumns() {
  const home = element("columns");
  home.replaceChildren(...settings.columns.map(columnOf));
  home.className = ["", "", "two", "three", "four"][settings.columns.length];
  element("add-column").disabled = settings.columns.length >= 4;
  answers = settings.columns.map((_, at) => new Answer(home.children[at], at, pointAt));
}

function columnOf(column, at) {
  const node = element("column").content.firstElementChild.cloneNode(true);
  const part = (name) => node.querySelector("." + name);
  node.setAttribute("aria-label", `Column ${at + 1}`);
  options(part("what"), kinds(), kindOf(column));
  part("remove").disabled = settings.columns.length <= 2;
  part("remove").onclick = () => { settings.columns.splice(at, 1); showColumns(); changed(); listen(); };
  part("save").onclick = attempt(() => save(at, node));
  const show = () => {
    const now = settings.columns[at], dosed = now.kind === "plan" || now.kind === "direction";
    part("dose").hidden = !dosed;
    part("along").hidden = now.kind !== "direction";
    part("rule").hidden = now.kind !== "arm";
    if (dosed) dose(part("dose"), now, now.kind === "plan" ? "dose" : "strength");
    if (now.kind === "direction") {
      options(part("along").querySelector(".layer"), Array.from({length: offer.shape.num_layers}, (_, layer) => layer), now.layer);
      options(part("along").querySelector(".scope"), [...new Set([...offer.scopes, now.scope])], now.scope);
      part("along").querySelector(".unit").value = now.unit;
      for (const [name, read] of [["layer", Number], ["scope", String], ["unit", String]])
        part("along").querySelector("." + name).onchange = (event) => { now[name] = read(event.target.value); changed(); };
    }
    part("save").textContent = dosed && !offer.remote ? "Make this a plan" : "Show the command";
    part("saved").hidden = true;
    if (now.kind === "arm") { part("word").value = now.word; part("word").oninput = () => { now.word = part("word").value; changed(); }; }
  };
  part("what").onchange = () => {
    const [kind, ...rest] = part("what").value.split(":"), name = rest.join(":");
    settings.columns[at] = kind === "plan" ? {kind, plan: name, dose: 1} : kind === "direction" ? direction(name) : kind === "arm" ? {kind, word: "budget:64"} : {kind};
    show();
    changed();
  };
  show();
  return node;
}

function dose(home, column, key) {
  const slider = home.querySelector(".slider"), number = home.querySelector(".value");
  home.querySelector(".name").textContent = key;
  [slider.min, slider.max] = key === "dose" ? [0, 4] : column.unit === "vector" ? [-8, 8] : [-1, 1];
  slider.value = number.value = column[key];
  slider.oninput = () => { column[key] = Number(slider.value); number.value = slider.value; changed(); };
  number.onchange = () => { column[key] = numberIn(number); slider.value = number.value; changed(); };
}

async function save(at, node) {
  const found = await ask(`${api}/plan`, "POST", {settings, column: at});
  node.querySelector(".saved").hidden = false;
  const same = element("stale").hidden && ran ? "The same tokens again, without a page:" : "What a run would make now, without a page:";
  node.querySelector(".where").textContent = found.plan ? `Wrote ${visible(found.plan)}. ${same}` : same;
  node.querySelector(".command").textContent = visible(found.command);
}

// Colours.
const colourKind = () => settings.colour.split(":")[0];

function wireColour() {
  const moe = !offer.remote && offer.shape.moe_layers.length, names = Object.keys(offer.directions);
  const found = offer.remote ? [["", "nothing: the model is on a server, which shows no inside"]] : [["steered", "where the plan acts"], ["entropy", "entropy: how undecided the model was"]];
  if (moe) found.push(["expert", "an expert's weight"]);
  if (names.length) found.push(["projection", "projection on a direction"]);
  options(element("colour"), found, colourKind());
  if (moe) { options(element("colour-layer"), offer.shape.moe_layers); element("colour-number").max = offer.shape.num_experts - 1; }
  if (names.length) { options(element("colour-name"), names); options(element("colour-after"), Array.from({length: offer.shape.num_layers}, (_, layer) => layer)); element("colour-after").value = offer.directions[names[0]].layer ?? 0; }
  const [kind, layer, ...rest] = settings.colour.split(":");
  if (kind === "expert") { element("colour-layer").value = layer; element("colour-number").value = rest[0]; }
  else if (moe && settings.plan.experts.length) { element("colour-layer").value = settings.plan.experts[0].layer; element("colour-number").value = settings.plan.experts[0].expert; }
  if (kind === "projection") { element("colour-after").value = layer; element("colour-name").value = rest.join(":"); }
  const chosen = () => {
    const word = element("colour").value;
    element("colour-expert").hidden = word !== "expert";
    element("colour-direction").hidden = word !== "projection";
    return word === "expert" ? `expert:${element("colour-layer").value}:${Math.round(Number(element("colour-number").value))}`
      : word === "projection" ? `projection:${element("colour-after").value}:${element("colour-name").value}` : word;
  };
  for (const id of ["colour", "colour-layer", "colour-number", "colour-name", "colour-after"])
    element(id).onchange = () => { settings.colour = chosen(); changed(); listen(); };
  chosen();
}

function paint() {
  const [low, high] = range(answers);
  answers.forEach((answer) => answer.paint(colourKind(), low, high));
  legend(element("legend"), colourKind(), low, high);
}

// The token that is pointed at.
let pointed = null;

function pointAt(answer, at, focused) {
  pointed = {answer, at};
  if (focused) { answer.spans.forEach((span) => { span.tabIndex = -1; }); answer.spans[at].tabIndex = 0; }
  const token = answer.tokens[at], line = element("token");
  line.replaceChildren(make("b", "", visible(JSON.stringify(token.text))), ` token ${at + 1} of column ${answer.number + 1}` + (token.id === null ? "" : `, id ${token.id}`));
  const words = [];
  if (token.entropy !== null && token.entropy !== undefined) words.push(`entropy ${token.entropy.toFixed(3)} nats`);
  if (token.steered !== null && token.steered !== undefined) words.push(token.steered ? "the plan acted here" : "not steered");
  if (token.value !== null && token.value !== undefined && ["expert", "projection"].includes(colourKind())) words.push(`${measured()} ${token.value.toFixed(3)}`);
  if (token.steered === null) words.push("the last token is drawn and never processed");
  if (offer.remote) words.push("a server shows no inside");
  line.append(words.length ? " · " + words.join(" · ") : "");
  element("token-experts").replaceChildren(...(token.experts || []).map(([layer, expert, weight]) => {
    const item = make("li", settings.plan.experts.some((entry) => entry.layer === layer && entry.expert === expert) ? "mine" : "");
    const look = make("button", "", `layer ${layer} expert ${expert}: ${weight === null ? "no number" : weight.toFixed(2)}`), add = make("button", "", "+ plan");
    look.type = add.type = "button";
    look.title = "Colour all tokens by this expert";
    add.setAttribute("aria-label", `Add layer ${layer} expert ${expert} to your plan`);
    look.onclick = () => { settings.colour = `expert:${layer}:${expert}`; wireColour(); changed(); listen(); };
    add.onclick = () => { addExpert(layer, expert); item.className = "mine"; };
    item.append(look, add);
    return item;
  }));
}

function measured() {
  const [kind, layer, ...rest] = settings.colour.split(":"), name = visible(rest.join(":"));
  return kind === "expert" ? `weight of layer ${layer} expert ${name}` : `along ${name} after layer ${layer}`;
}

function keys(event) {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") { event.preventDefault(); element("run").click(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && pointed && element("inspector").contains(document.activeElement)) { pointed.answer.focus(pointed.at); return; }
  if (!document.activeElement.dataset.at || !pointed) return;
  const {answer, at} = pointed;
  const seek = (step) => { for (let i = at + step; i >= 0 && i < answer.spans.length; i += step) if (answer.coloured(i)) { answer.focus(i); return; } };
  const moves = {ArrowRight: () => answer.focus(at + 1), ArrowLeft: () => answer.focus(at - 1), Home: () => answer.focus(0), End: () => answer.focus(answer.spans.length - 1),
    n: () => seek(1), p: () => seek(-1), Enter: () => element("token-experts").querySelector("button")?.focus()};
  if (moves[event.key]) { moves[event.key](); event.preventDefault(); }
}

// A run, and what is heard of it. Another colour is heard from the beginning, from the same run.
const run = attempt(async () => {
  say("");
  await keep();
  await ask(`${api}/run`, "POST", settings);
  ran = structuredClone(settings);
  tellStale();
  showColumns();
  listen();
});

function listen() {
  if (source) source.close();
  if (!ran) return;
  const here = new EventSource(`${api}/events?colour=${encodeURIComponent(settings.colour)}`);
  source = here;
  running(true);
  element("ended").textContent = "";
  let painting = 0;
  const place = places();
  here.onmessage = (event) => {
    const news = JSON.parse(event.data);
    if (place[news.column] === undefined) return;
    answers[place[news.column]].take(news);
    painting = painting || requestAnimationFrame(() => { painting = 0; paint(); });
  };
  const ended = () => {
    here.close();
    running(false);
    paint();
    answers.forEach((answer, at) => answer.close(["plan", "direction"].includes(ran.columns[place.indexOf(at)]?.kind) && !offer.remote, answers[0]));
    element("ended").textContent = "All columns have ended.";
  };
  here.addEventListener("end", ended);
  here.onerror = attempt(async () => {
    ended();
    await ask(`${api}/events?colour=${encodeURIComponent(settings.colour)}`);  // for the sentence
  });
}

function running(on) {
  element("run").disabled = element("next-seed").disabled = on;
  element("stop").hidden = !on;
  element("playground").setAttribute("aria-busy", String(on));
}

async function begin() {
  offer = await ask("/api/offer");
  const kept = await ask(api);
  settings = {...usual(), ...kept.settings};
  element("about").textContent = visible(`${offer.model} · ${offer.line}`);
  element("task-name").textContent = visible(`Problem of ${offer.task}`);
  element("of").textContent = `of ${offer.problems.length}`;
  element("problem").max = offer.problems.length;
  options(element("arms"), offer.arms.map((text) => [text.split(/[ ,]/)[0], text]));
  element("run").onclick = run;
  element("stop").onclick = attempt(() => ask(`${api}/stop`, "POST", {}));
  element("add-column").onclick = () => {
    settings.columns.push(settings.columns.find((one) => one.kind === "plan") ? {...settings.columns.find((one) => one.kind === "plan"), dose: 2} : {kind: "plain"});
    showColumns();
    changed();
    listen();
  };
  document.addEventListener("keydown", keys);
  wirePrompt();
  wirePlan();
  wireColour();
  showPlan();
  showColumns();
  await showProblem();
  await keep();
  running(false);
  ran = kept.ran;
  tellStale();
  listen();
}

attempt(async () => {
  try { await begin(); } catch (error) {
    element("about").textContent = "not loaded";
    for (const button of document.querySelectorAll("#playground button")) button.disabled = true;
    throw error;
  }
})();
