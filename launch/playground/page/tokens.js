// What columns answer: tokens that arrive, their colours, and the one that is pointed at. Whatever a model writes becomes text.

export function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// What no eye sees, and what would turn the reading direction, is shown as its code.
export function visible(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
    (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

const counted = (number) => `${number} token${number === 1 ? "" : "s"}`;
const TITLES = {thought: "Thought", answer: "Answer", other: "Other"};
// Colours of playground.css, for values above and below 0.
const COLOURS = {steered: ["steered"], entropy: ["entropy"], expert: ["expert"], projection: ["along", "against"]};

// The tokens of one column.
export class Answer {
  constructor(section, number, pointed) {
    this.section = section;
    this.number = number;
    this.tokens = [];
    this.spans = [];
    this.blocks = [];
    this.home = section.querySelector(".answer");
    this.home.replaceChildren();
    this.home.setAttribute("aria-label", `Tokens of column ${number + 1}; arrow keys move from token to token, n and p between coloured ones, Enter goes to its experts`);
    this.home.onmouseover = (event) => { if (event.target.dataset.at) pointed(this, Number(event.target.dataset.at), false); };
    this.home.addEventListener("focusin", (event) => { if (event.target.dataset.at) pointed(this, Number(event.target.dataset.at), true); });
  }

  // Take what the server says. Tokens may come again, with another colour or another place in thought and answer.
  take(news) {
    const moved = news.tokens.some((token, i) => this.tokens[news.from + i] && this.tokens[news.from + i].part !== token.part);
    if (moved || news.length < this.tokens.length) this.clear();
    news.tokens.forEach((token, i) => this.put(news.from + i, token));
    for (const block of this.blocks) {
      const number = block.spans.filter((span) => !span.classList.contains("edge")).length;
      block.title.textContent = `${TITLES[block.part]} · ${counted(number)}`;
    }
    this.tell(news);
  }

  clear() {
    this.home.replaceChildren();
    this.spans = [];
    this.blocks = [];
    this.tokens = [];
  }

  put(at, token) {
    this.tokens[at] = token;
    if (this.spans[at]) return;
    const span = make("span", token.part === "tag" ? "edge" : "");
    span.dataset.at = at;
    span.tabIndex = this.spans.length ? -1 : 0;
    this.spans[at] = span;
    const block = this.block(token.part);
    span.textContent = this.shown(token.text, block);
    const follows = block.text.scrollTop + block.text.clientHeight > block.text.scrollHeight - 30;
    block.spans.push(span);
    block.text.append(span);
    if (follows) block.text.scrollTop = block.text.scrollHeight;
  }

  // Empty lines at the head of a block are tokens like others, and need no room.
  shown(text, block) {
    const text_only = visible(text), leads = !text_only.trim() && block.spans.every((span) => !span.textContent.replaceAll("\u21b5", "").trim());
    return leads ? text_only.replaceAll("\n", "\u21b5") : text_only;
  }

  block(part) {
    const last = this.blocks[this.blocks.length - 1];
    if (last && (part === "tag" || last.part === part)) return last;
    const block = {part: part === "tag" ? "thought" : part, spans: [], title: make("h3"), text: make("div", "tokens")};
    const node = make("div", `block is-${block.part}`);
    node.append(block.title, block.text);
    this.home.append(node);
    this.blocks.push(block);
    return block;
  }

  // At the end: where the plan acted (``acts``: one was asked for), and whether the tokens are those of the first column. A column that the
  // server left in the middle says so.
  close(acts, first) {
    if (this.section.classList.contains("running")) {
      this.section.classList.remove("running");
      this.section.querySelector(".state").textContent = "broken off";
    }
    const words = [], number = this.tokens.filter((token) => token.steered).length;
    if (acts && this.state === "done") words.push(number ? `acted at ${counted(number)}` : "acted at none of these tokens");
    if (first !== this && this.state === "done" && first.state === "done") {
      const same = (at) => this.tokens[at]?.id === first.tokens[at]?.id && this.tokens[at]?.text === first.tokens[at]?.text;
      const length = Math.max(this.tokens.length, first.tokens.length), other = Array.from({length}, (_, at) => at).find((at) => !same(at));
      words.push(other === undefined ? "the same text as column 1" : this.tokens[0].id === null ? "another text than column 1" : `differs from column 1 from token ${other + 1} on`);
    }
    this.section.querySelector(".effect").textContent = words.join(" · ");
  }

  // The line above the tokens: how it ended, how long it is, how it was graded.
  tell(news) {
    const state = this.section.querySelector(".state"), numbers = this.section.querySelector(".numbers"), error = this.section.querySelector(".error");
    const going = news.state === "running" || news.state === "waiting";
    this.section.classList.toggle("running", going);
    const outcome = news.grade ? news.grade.word : news.state === "done" ? "" : news.state;
    state.textContent = going ? news.state : outcome;
    state.className = "state tag" + (news.grade ? (news.grade.outcome === "correct" ? " good" : " bad") : "");
    state.title = news.grade ? news.grade.reason : "";
    const counts = news.counts;
    this.state = news.state;
    const words = [visible(news.title)];
    if (news.grade && news.grade.extracted !== null && news.grade.outcome !== "correct") words.push(`answered ${visible(news.grade.extracted).slice(0, 40)}`);
    if (news.grade && (news.grade.outcome === "grader_error" || news.grade.extracted === null)) words.push(visible(news.grade.reason).slice(0, 160));
    words.push(counted(counts ? counts.total : news.length));
    if (news.seconds) words.push(`${news.seconds} s`);
    numbers.textContent = words.join(" · ");
    error.hidden = !news.error;
    error.textContent = visible(news.error);
  }

  paint(kind, low, high) {
    this.tokens.forEach((token, at) => {
      const colour = shade(kind, token.value, low, high);
      this.spans[at].style.background = colour;
      this.spans[at].classList.toggle("on", colour !== "");
    });
  }

  coloured(at) { return this.spans[at].classList.contains("on"); }

  focus(at) {
    if (!this.spans[at]) return;
    this.spans.forEach((span) => { span.tabIndex = -1; });
    this.spans[at].tabIndex = 0;
    this.spans[at].focus({preventScroll: false});
  }
}

export function shade(kind, value, low, high) {
  if (value === null || value === undefined || !COLOURS[kind]) return "";
  const most = kind === "projection" ? Math.max(Math.abs(low), Math.abs(high)) : high;
  const share = kind === "steered" ? value * 0.7 : most > 0 ? Math.abs(value) / most : 0;
  if (share < 0.01) return "";
  return `hsl(var(--${COLOURS[kind][value < 0 ? 1 : 0]}) / ${(0.1 + 0.52 * Math.min(1, share)).toFixed(3)})`;
}

// Smallest and largest value of all columns.
export function range(answers) {
  let low = 0, high = 0;
  for (const answer of answers) for (const token of answer.tokens) {
    if (token.value === null || token.value === undefined) continue;
    low = Math.min(low, token.value);
    high = Math.max(high, token.value);
  }
  return [low, high];
}

export function legend(node, kind, low, high) {
  node.replaceChildren();
  if (!COLOURS[kind]) return;
  const most = kind === "projection" ? Math.max(Math.abs(low), Math.abs(high)) : high;
  const ramp = make("span", "ramp");
  const at = (value) => shade(kind, value, -most, most) || "transparent";
  if (kind === "steered") ramp.style.background = at(1);
  else if (kind === "projection") ramp.style.background = `linear-gradient(90deg, ${at(-most)}, transparent, ${at(most)})`;
  else ramp.style.background = `linear-gradient(90deg, ${at(most * 0.02)}, ${at(most)})`;
  const words = {steered: ["", "the plan acted"], entropy: ["0", `${high.toFixed(2)} nats`], expert: ["0", `weight ${high.toFixed(2)}`],
    projection: [(-most).toFixed(2), most.toFixed(2)]}[kind];
  node.append(make("span", "", words[0]), ramp, make("span", "", words[1]));
}
