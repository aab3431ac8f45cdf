// The conversation as it is seen: a turn for each message, a span for each token of an answer. One token may be chosen.
//
// Decisions: spans are only ever added, and a line of text is a block of its own, so that a long answer stays quick. Arrow
// keys move the choice while an answer has the focus; a screen reader hears the chosen token, and reads answers as texts.

const LIKELY = [0.9, 0.7, 0.4, 0.15, 0.03];  // a token at least as likely has the colour of that place
const BARE = /^(?:(?![\n\t])\p{C})*$/u;          // a text without a shape to point at
const NEAR_END = 48;                         // pixels from its end at which the log follows what is added

function userTurn(text) {
  return element("article", "turn user", element("h3", "unseen", "You"), element("p", "", text));
}

/** The view of one Answer. `onChoose` is told of a token. */
class AnswerView {
  constructor(answer, onChoose) {
    this.answer = answer;
    this.onChoose = onChoose;
    this.shown = 0;           // parts that have an element
    this.bodies = new Map();  // of parts: their element, and how much of them it shows
    this.chosen = null;
    this.tokens = element("div", "tokens");
    this.tokens.tabIndex = 0;
    this.tokens.setAttribute("role", "group");
    this.call("Answer. Arrow keys choose a token.");
    this.note = element("p", "note ending");
    this.copy = element("button", "small", "Copy");
    this.copy.hidden = true;
    this.turn = element("article", "turn answer", element("h3", "unseen", "Answer"), this.tokens, element("div", "bar", this.note, this.copy));
    this.tokens.addEventListener("click", (event) => this.choose(event.target.closest(".t")?.token));
    this.tokens.addEventListener("keydown", (event) => this.step(event));
    this.copy.addEventListener("click", () => this.copyText());
  }

  /** Show what has come since the last time. */
  paint() {
    const { parts } = this.answer;
    for (; this.shown < parts.length; this.shown++) this.open(parts[this.shown]);
    for (const [part, body] of this.bodies) this.fill(part, body);
  }

  open(part) {
    const inner = element("div", "text"), body = { inner, line: null, num: 0, text: null };
    const word = { [REASONING]: "Reasoning", [CALL]: `Calls ${part.call?.name}` }[part.kind];
    if (part.kind === CALL) body.text = element("pre");
    const folded = word && element("details", part.kind, element("summary", "", word), ...(body.text ? [body.text] : []), inner);
    if (folded) folded.open = true;
    this.tokens.append(folded ?? inner);
    this.bodies.set(part, body);
  }

  fill(part, body) {
    if (body.text && body.text.textContent !== part.text) body.text.textContent = part.text;
    if (!part.tokens.length && part.kind !== CALL && body.inner.textContent !== part.text) body.inner.textContent = part.text;
    if (part.tokens.length && !body.num) body.inner.replaceChildren();
    for (; body.num < part.tokens.length; body.num++) this.append(body, part.tokens[body.num]);
  }

  append(body, token) {
    if (!body.line) body.inner.append((body.line = element("div", "line")));
    body.line.append((token.span = spanOf(token)));
    if (token.shown.endsWith("\n")) body.line = null;
  }

  choose(token) {
    if (!token) return;
    this.release();
    this.chosen = token;
    token.span.classList.add("chosen");
    const folded = token.span.closest("details");
    if (folded) folded.open = true;
    token.span.scrollIntoView({ block: "nearest" });
    this.onChoose(this, token);
  }

  release() {
    this.chosen?.span.classList.remove("chosen");
    this.chosen = null;
  }

  step(event) {
    if (event.target !== this.tokens || event.ctrlKey || event.altKey || event.metaKey) return;
    const last = this.answer.tokens.length - 1, at = this.chosen?.index ?? -1;
    const next = { ArrowRight: at + 1, ArrowLeft: Math.max(0, at - 1), Home: 0, End: last }[event.key] ?? this.across(event.key);
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.choose(this.drawn(Math.min(next, last)));
  }

  drawn(index) {
    const token = this.answer.tokens[index];
    return token?.span && token;
  }

  /** Index of the token above or below the chosen one; undefined for other keys. */
  across(key) {
    const way = { ArrowDown: 1, ArrowUp: -1 }[key], { tokens } = this.answer;
    if (!way || !this.chosen) return way && 0;
    const from = this.chosen.span.getBoundingClientRect();
    let best = this.chosen.index, top = null;
    for (let i = best + way; this.drawn(i); i += way) {
      const box = tokens[i].span.getBoundingClientRect();
      if (way * (box.top - from.top) < from.height / 2) continue;
      if (top !== null && Math.abs(box.top - top) > from.height / 2) break;
      if (top === null || Math.abs(box.left - from.left) < Math.abs(tokens[best].span.getBoundingClientRect().left - from.left)) best = i;
      top = box.top;
    }
    return best;
  }

  /** Say how it ended, in a sentence. */
  close(sentence, isError) {
    this.paint();
    this.note.textContent = sentence;
    this.note.classList.toggle("error", isError);
    this.copy.hidden = !this.answer.parts.length;
    const { tokens } = this.answer;
    this.call(`Answer of ${several(tokens.length, "token", "tokens")}. Arrow keys choose one.`);
  }

  call(name) {
    this.tokens.setAttribute("aria-label", name);
  }

  async copyText() {
    const text = this.answer.textOf(TEXT) || this.answer.parts.map((part) => part.text).join("\n");
    try {
      await navigator.clipboard.writeText(text);
      this.copy.textContent = "Copied";
    } catch {
      // Without TLS, a browser lends its clipboard to no page of another machine.
      getSelection().selectAllChildren(this.tokens);
      this.copy.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => (this.copy.textContent = "Copy"), 2000);
  }
}

function spanOf(token) {
  const likely = Math.exp(token.logprob), place = LIKELY.findIndex((least) => likely >= least);
  const span = element("span", `t p${place < 0 ? LIKELY.length : place}`);
  span.classList.toggle("special", token.isSpecial);
  span.classList.toggle("bare", BARE.test(token.shown));
  span.classList.toggle("fresh", token.isNewVersion);
  const [first, ...more] = token.shown.split("\n");
  span.append(first);
  for (const text of more) span.append(element("i", "newline"), `\n${text}`);
  span.token = token;
  return span;
}
