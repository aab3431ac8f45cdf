// An answer as it arrives: its tokens, and its parts, which are reasoning, text or calls of tools. Nothing is drawn here.
//
// Decisions: what is shown of a token are its own bytes, decoded in the order of the tokens: so every token can be pointed at,
// also one whose text the server holds back or leaves out. What is copied and sent back is the text that the server sent.

const CALL = "call", REASONING = "reasoning", TEXT = "text";

class Part {
  constructor(kind, call = null) {
    this.kind = kind;
    this.call = call;   // {index, id, name} of a call, whose arguments are the text
    this.text = "";
    this.tokens = [];
  }
}

class Answer {
  /** `isSpecial` says which token ids are no text. */
  constructor(isSpecial) {
    this.isSpecial = isSpecial;
    this.parts = [];
    this.tokens = [];
    this.early = [];       // tokens of no part yet
    this.version = null;   // of the weights that made the latest token
    this.finish = this.stoppedBy = this.usage = this.routing = null;
    this.characters = new TextDecoder("utf-8", { ignoreBOM: true });
    this.askedAt = performance.now();
    this.firstAt = this.lastAt = null;
  }

  take(event) {
    if (event.usage) this.usage = event.usage;
    const [choice] = event.choices;
    if (!choice) return;
    this.version = choice.weights_version ?? this.version;
    for (const piece of piecesOf(choice)) this.part(piece).text += piece.text;
    this.add(tokensOf(choice));
    if (choice.routed_experts) this.routing = new Routing(choice.routed_experts);
    this.finish = choice.finish_reason ?? this.finish;
    this.stoppedBy = choice.stop_reason ?? this.stoppedBy;
  }

  /** The part that a piece goes on with, or begins. */
  part({ kind, call }) {
    const last = this.parts.at(-1);
    if (last?.kind === kind && last.call?.index === call?.index) return last;
    this.parts.push(new Part(kind, call));
    return this.parts.at(-1);
  }

  add(tokens) {
    if (tokens.length) this.firstAt ??= performance.now();
    if (tokens.length) this.lastAt = performance.now();
    for (const token of tokens) {
      const before = this.tokens.at(-1)?.version ?? this.version;
      Object.assign(token, { index: this.tokens.length, version: this.version, isNewVersion: before !== this.version });
      this.show(token);
      this.tokens.push(token);
    }
    this.early.push(...tokens);
    if (this.parts.length) this.parts.at(-1).tokens.push(...this.early.splice(0));
  }

  /** What the token adds to the text: of a character in several tokens, the last one shows it. */
  show(token) {
    token.isSpecial = this.isSpecial(token.id);
    if (token.isSpecial || !token.bytes) token.shown ??= token.name;
    else token.shown = this.characters.decode(Uint8Array.from(token.bytes), { stream: true });
  }

  /** Nothing more comes. */
  end() {
    if (this.early.length) this.part({ kind: TEXT }).tokens.push(...this.early.splice(0));
  }

  textOf(kind) {
    return this.parts.filter((part) => part.kind === kind).map((part) => part.text).join("");
  }

  /** Rows of experts that a token went to, when they are known. */
  expertsOf(token) {
    return this.routing && this.usage ? this.routing.of(this.usage.prompt_tokens + token.index) : null;
  }

  get firstTokenS() {
    return this.firstAt === null ? null : (this.firstAt - this.askedAt) / 1000;
  }

  get tokensPerS() {
    const passed = (this.lastAt - this.firstAt) / 1000;
    return passed > 0 ? (this.tokens.length - 1) / passed : null;
  }

  /** The answer as a message of the conversation that goes on. */
  get message() {
    const calls = this.parts.filter((part) => part.kind === CALL), reasoning = this.textOf(REASONING);
    const tool_calls = calls.map(({ call, text }) => ({ id: call.id, type: "function", function: { name: call.name, arguments: text } }));
    const more = { ...(reasoning && { reasoning }), ...(calls.length && { tool_calls }) };
    return { role: "assistant", content: this.textOf(TEXT), ...more };
  }
}

/** Pieces of text in a choice of a chunk: a chat's, or a completion's. */
function piecesOf(choice) {
  if (!choice.delta) return choice.text ? [{ kind: TEXT, text: choice.text }] : [];
  const { content, reasoning, reasoning_content, tool_calls } = choice.delta, thought = reasoning ?? reasoning_content;
  const calls = (tool_calls ?? []).map((call) => ({
    kind: CALL,
    call: { index: call.index, id: call.id, name: call.function?.name },
    text: call.function?.arguments ?? "",
  }));
  return [...(thought ? [{ kind: REASONING, text: thought }] : []), ...(content ? [{ kind: TEXT, text: content }] : []), ...calls];
}

/** Tokens in a choice of a chunk; those of a completion have no bytes, only names. */
function tokensOf({ logprobs, token_ids, text }) {
  if (logprobs?.content) {
    const top = (one) => one.top_logprobs.map(({ token, bytes, logprob }) => ({ name: token, bytes, logprob }));
    return logprobs.content.map((one, i) => ({ id: token_ids?.[i], name: one.token, bytes: one.bytes, logprob: one.logprob, top: top(one) }));
  }
  return (logprobs?.tokens ?? []).map((name, i, all) => ({
    id: token_ids?.[i],
    name,
    // Part of a character: the chunk's text has it as soon as it is whole.
    shown: name.includes("\ufffd") && all.length === 1 ? text : name,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {}).map(([key, logprob]) => ({ name: key, logprob })),
  }));
}
