// The page to try a model: asks for answers, and keeps the conversation. Text of others goes into textContent only.

const AGAIN_MS = 2000;
const RESTS = 3;       // times what drawing took, before more is drawn: a very long line takes a while
const key = new TabKey("trinity-api-key");

let facts = null;      // of the model, as the server tells them
let turns = [];        // {message} of the user, {message, answer, view} of the model
let asking = null;     // the AbortController of the answer under way
let chosenIn = null;   // the view with the chosen token
let painting = 0;      // the frame in which the next tokens are drawn
let restsUntil = 0;

// --- how it stands --------------------------------------------------------------------------------------------------

function stand(state, word, alert = "") {
  set("state", word);
  $("state").dataset.state = state;
  $("alert").hidden = !alert;
  set("alert", alert);
}

function showButtons() {
  $("send").hidden = !!asking;
  $("stop").hidden = !asking;
  $("again").disabled = !!asking || !turns.length;
  $("clear").disabled = !turns.length;
  $("empty").hidden = !!turns.length;
  $("forget").hidden = !key.value;
}

function lock(message) {
  const why = key.value ? `This key was refused: ${message}.` : `Locked: ${message}.`;
  key.forget();
  stand("locked", "locked");
  $("main").hidden = true;
  showLock(true, why);
  showButtons();
}

async function meet() {
  showButtons();
  try {
    facts = await (await ask("page/data", key)).json();
  } catch (error) {
    if (error.status === 401) return lock(error.message);
    stand("away", "server away", error instanceof Refused ? `${error.message}.` : "The server does not answer. Trying every 2 seconds.");
    return setTimeout(meet, AGAIN_MS);
  }
  showLock(false);
  $("main").hidden = false;
  stand("live", "ready");
  showFacts();
  $("message").focus();
}

function showFacts() {
  set("model", `· ${facts.model}`);
  document.title = `${facts.model} · Trinity`;
  set("version", `${facts.weights_version}`);
  const { has_chat_template, defaults } = facts;
  set("how", has_chat_template ? "" : "This model has no chat template: it continues the text as it stands.");
  $("how").hidden = has_chat_template;
  $("system").disabled = !has_chat_template;
  const hints = { max_tokens: `up to ${facts.max_model_len}`, ...defaults };
  for (const field of fields()) if (field.name in hints) field.placeholder = `${hints[field.name]}`;
}

function showPace(answer) {
  if (answer.version !== null) set("version", `${answer.version}`);
  set("first", answer.firstTokenS === null ? "–" : `${answer.firstTokenS.toFixed(2)} s`);
  set("rate", answer.tokensPerS === null ? "–" : rate(answer.tokensPerS));
}

// --- what is asked for ----------------------------------------------------------------------------------------------

const fields = () => [...$("settings").querySelectorAll("input[name]")];

/** The fields that are filled in, as the API takes them. Throws for what is no number. */
function sampling() {
  const given = {};
  for (const field of fields()) {
    if (field.validity.badInput) throw new Error(`${field.labels[0].textContent} is not a number`);
    if (field.value.trim()) given[field.name] = Number(field.value);
  }
  if ("seed" in given && !Number.isSafeInteger(given.seed)) throw new Error(`Seed: a whole number up to ${Number.MAX_SAFE_INTEGER}, please`);
  const stop = $("stops").value.split("\n").filter(Boolean).map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  return { ...given, ...(stop.length && { stop }) };
}

function request() {
  const { num_alternatives, ...given } = sampling(), system = $("system").value.trim();
  const common = {
    ...given,
    model: facts.model,
    stream: true,
    stream_options: { include_usage: true },
    return_token_ids: true,
    ...(facts.has_routed_experts && { return_routed_experts: true }),
  };
  const messages = turns.map((turn) => turn.message).filter((message) => message.role === "user" || hasSaid(message));
  if (!facts.has_chat_template)
    return ["v1/completions", { ...common, prompt: messages.map((message) => message.content).join(""), logprobs: num_alternatives ?? 0 }];
  const all = [...(system ? [{ role: "system", content: system }] : []), ...messages];
  return ["v1/chat/completions", { ...common, messages: all, logprobs: true, top_logprobs: num_alternatives ?? 0 }];
}

const hasSaid = ({ content, tool_calls, reasoning }) => content || tool_calls || reasoning;

// --- answers --------------------------------------------------------------------------------------------------------

async function send(text) {
  turns.push({ message: { role: "user", content: text } });
  $("log").append((turns.at(-1).element = userTurn(text)));
  await answer();
}

async function answer() {
  const special = new Set(facts.special_ids), made = new Answer((id) => special.has(id)), view = new AnswerView(made, choose);
  let asked;
  try {
    asked = request();
  } catch (error) {
    asked = error;
  }
  turns.push({ get message() { return made.message; }, answer: made, element: view.turn });
  $("log").append(view.turn);
  asking = new AbortController();
  stand("busy", "answering");
  showButtons();
  follow(true);
  await finished(view, asked instanceof Error ? Promise.reject(asked) : stream(view, ...asked));
}

async function stream(view, path, body) {
  for await (const event of eventsOf(await ask(path, key, body, asking.signal))) {
    view.answer.take(event);
    painting ||= requestAnimationFrame(() => paintInTurn(view));
  }
}

function paintInTurn(view) {
  const began = performance.now();
  painting = began < restsUntil ? requestAnimationFrame(() => paintInTurn(view)) : 0;
  if (painting) return;
  paint(view);
  restsUntil = performance.now() + RESTS * (performance.now() - began);
}

function paint(view) {
  const isAtEnd = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < NEAR_END;
  view.paint();
  showPace(view.answer);
  follow(isAtEnd);
}

function follow(isAtEnd) {
  if (isAtEnd) $("log").scrollTop = $("log").scrollHeight;
}

/** Wait for the end of an answer, and show how it ended. */
async function finished(view, work) {
  const made = view.answer;
  const error = await work.then(() => null, (error) => error);
  cancelAnimationFrame(painting);
  painting = 0;
  made.end();
  made.isOver = true;
  paint(view);
  asking = null;
  stand("live", "ready");
  view.close(...ending(made, error));
  follow(true);
  if (chosenIn === view) choose(view, view.chosen);
  set("spoken", error ? view.note.textContent : `The answer is complete: ${made.tokens.length} tokens.`);
  if (error?.status === 401) lock(error.message);
  showButtons();
}

/** How an answer ended, and whether that is an error. */
function ending(made, error) {
  const count = several(made.tokens.length, "token", "tokens");
  if (error?.name === "AbortError") return [`Stopped after ${count}`, false];
  if (error instanceof TypeError) return ["The server does not answer", true];
  if (error) return [error.message, true];
  const prompt = made.usage ? `, after a prompt of ${plain.format(made.usage.prompt_tokens)}` : "";
  const why = { length: "the limit of tokens", tool_calls: "a call" }[made.finish] ?? (typeof made.stoppedBy === "string" ? `the stop string ${visible(made.stoppedBy)}` : "its own end");
  return [`${count}${prompt}; ended by ${why}`, false];
}

function choose(view, token) {
  if (chosenIn !== view) chosenIn?.release();
  chosenIn = view;
  showToken(token, view.answer, facts);
}

function unchoose() {
  chosenIn?.release();
  chosenIn = null;
  showToken(null);
}

/** Take the latest answer back. */
function drop() {
  if (!turns.at(-1)?.answer) return;
  const { element: gone } = turns.pop();
  if (chosenIn?.turn === gone) unchoose();
  gone.remove();
}

// --- what happens ---------------------------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value;
  if (!text.trim() || asking) return;
  $("message").value = "";
  send(text);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => {
  asking?.abort();
  $("message").focus();
});
$("again").addEventListener("click", () => {
  drop();
  answer();
});
$("clear").addEventListener("click", () => {
  asking?.abort();
  turns = [];
  unchoose();
  $("log").replaceChildren($("empty"));
  showButtons();
  $("message").focus();
});
$("close").addEventListener("click", unchoose);
$("coloured").addEventListener("change", () => $("log").classList.toggle("coloured", $("coloured").checked));
document.addEventListener("keydown", (event) => event.key === "Escape" && unchoose());
$("settings").open = matchMedia("(min-width: 60rem)").matches;
onUnlock(key, meet);
$("forget").addEventListener("click", () => {
  asking?.abort();
  key.forget();
  meet();
});
meet();
