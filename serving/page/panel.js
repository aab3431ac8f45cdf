// The panel about the chosen token: how likely it was, what else might have come, which weights made it, and its experts.

const NAMES = new Map([[" ", "␣"], ["\n", "↵"], ["\t", "⇥"]]);
const LINGER = 137.508;  // degrees between the colours of neighbours, so that no two of them are alike

/** Text in which everything can be seen: spaces, ends of lines, characters without a shape. */
function visible(text) {
  const code = (letter) => `⟨${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  return text.replace(/[\p{C}\p{Z}]/gu, (letter) => NAMES.get(letter) ?? code(letter)) || "∅";
}

const hex = (bytes) => bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");

/** What a token is called: its text, and its bytes where these are no whole characters. */
const nameOf = ({ name, bytes }) => (name.includes("\ufffd") && bytes ? `bytes ${hex(bytes)}` : visible(name));

/** The same of a token in the text: the last part of a character is called by the character. */
const titleOf = (token) => (token.shown && !token.shown.includes("\ufffd") ? visible(token.shown) : nameOf(token));

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 0.01 ? `${Number(value.toPrecision(value > 99 ? 4 : 3))} %` : `${value.toExponential(1)} %`;
}

/** Rank among the alternatives, in words. */
function rankOf(token) {
  const rank = 1 + token.top.filter((one) => one.logprob > token.logprob).length;
  return !token.top.length ? "" : rank > token.top.length ? `not among the ${token.top.length} likeliest` : rank === 1 ? "the likeliest" : `number ${rank}`;
}

function showToken(token, answer, facts) {
  $("chosen").hidden = !token;
  $("unchosen").hidden = !!token;
  if (!token) return;
  set("token-text", titleOf(token));
  set("token-place", `${plain.format(token.index + 1)} of ${plain.format(answer.tokens.length)}`);
  set("token-id", token.id === undefined ? "–" : `${token.id}`);
  set("token-bytes", token.bytes ? hex(token.bytes) || "none" : "–");
  set("token-likely", percent(token.logprob));
  set("token-logprob", `log ${token.logprob.toFixed(4)}`);
  set("token-rank", rankOf(token));
  set("token-version", `${token.version ?? "–"}`);
  showAlternatives(token);
  showExperts(token, answer, facts);
  set("spoken", `${titleOf(token)}, ${percent(token.logprob)}, ${rankOf(token)}, weights ${token.version}`);
}

function showAlternatives(token) {
  const rows = token.top.map((one) => {
    const made = element("tr", "", element("td", "name", nameOf(one)), element("td", "number", percent(one.logprob)), element("td", "", gauge(Math.exp(one.logprob))));
    made.classList.toggle("drawn", one.name === token.name && one.logprob === token.logprob);
    return made;
  });
  $("alternatives").replaceChildren(...rows);
  $("alternatives-table").hidden = !rows.length;
}

function showExperts(token, answer, facts) {
  const rows = answer.expertsOf(token);
  set("no-experts", rows ? "" : whyNoExperts(answer, facts));
  $("experts-frame").hidden = !rows;
  const layer = (l) => facts.moe_layers[l] ?? l;
  $("experts").replaceChildren(...(rows ?? []).map((experts, l) => {
    const cells = experts.map((expert) => element("td", "", expertCell(layer(l), expert, facts.has_pool)));
    return element("tr", "", Object.assign(element("th", "", `${layer(l)}`), { scope: "row" }), ...cells);
  }));
}

function expertCell(layer, expert, hasPool) {
  const made = element(hasPool ? "a" : "span", "expert", `${expert}`);
  made.style.setProperty("--hue", `${(expert * LINGER) % 360}`);
  made.title = `layer ${layer}, expert ${expert}`;
  if (hasPool) Object.assign(made, { href: `dashboard#expert=${layer}.${expert}`, target: "_blank", rel: "noopener" });
  return made;
}

function whyNoExperts(answer, facts) {
  if (!facts.has_routed_experts) return "This server does not tell; it does with --serve.routed_experts true.";
  if (answer.routing) return "None: the last token went through no layer.";
  return answer.isOver ? "Unknown: the server tells at the end of an answer, and this one was not finished." : "The server tells at the end of the answer.";
}
