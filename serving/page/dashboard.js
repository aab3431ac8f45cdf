// Asks for the snapshot every second while the page is seen, and draws it. Text of others goes into textContent only.

const PERIOD_MS = 1000, NO_POOL_MS = 10000, TIMEOUT_MS = 5000, STALE_S = 5, MOVED_MS = 8000;
const PHASES = { done: "good", "rolled back": "bad" };
const STATES = { ready: "good", draining: "warn", starting: "warn", away: "bad" };
const EXPERT = /^#expert=(\d+)\.(\d+)$/;  // layer and expert that a link asks for

const key = new TabKey("trinity-admin-key");
let seen = null;      // the latest snapshot
let seenAgeS = 0;     // how old it was when it came
let seenAt = 0;       // when it came, by performance.now()
let trouble = null;   // {state, text} of the latest failed attempt
let timer = 0, asking = false;

// --- asking ---------------------------------------------------------------------------------------------------------

async function tick() {
  clearTimeout(timer);
  if (asking || document.hidden) return;
  asking = true;
  const wait = await ask();
  asking = false;
  show();
  if (wait !== null && !document.hidden) timer = setTimeout(tick, wait);
}

/** One attempt; -> milliseconds until the next one, null for none until something happens. */
async function ask() {
  const started = performance.now();
  try {
    const options = { headers: key.headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(TIMEOUT_MS) };
    const answer = await fetch("dashboard/data", options);
    const body = await answer.json();
    if (!answer.ok) return refused(answer.status, body.error?.message ?? `HTTP ${answer.status}`);
    accept(body);
  } catch {
    trouble = { state: "away", text: "The server does not answer" };
  }
  return Math.max(100, PERIOD_MS - (performance.now() - started));
}

function refused(status, message) {
  if (status === 401) {
    trouble = { state: "locked", text: key.value ? `This key was refused: ${message}.` : `Locked: ${message}.` };
    forget();
    return null;
  }
  trouble = { state: status === 404 ? "none" : "away", text: message };
  return status === 404 ? NO_POOL_MS : PERIOD_MS;
}

function accept(body) {
  heat.follow(seen, body.snapshot);
  const isFirst = !seen;
  seen = body.snapshot;
  if (isFirst) lookAtLinked();
  seenAgeS = body.age_s;
  seenAt = performance.now();
  trouble = null;
}

/** The expert that the page's address names is looked at, as if the keyboard had chosen it. */
function lookAtLinked() {
  const [, layer, expert] = (EXPERT.exec(location.hash) ?? []).map(Number), l = seen.layers.indexOf(layer);
  if (l < 0 || expert >= seen.load[l].length) return;
  $("main").hidden = false;
  $("heat").focus();
  heat.at = { l, e: expert };
}

function forget() {
  key.forget();
  seen = null;
}

// --- how it stands --------------------------------------------------------------------------------------------------

const ageS = () => seenAgeS + (performance.now() - seenAt) / 1000;

function standing() {
  if (trouble?.state === "locked") return { state: "locked", word: "locked" };
  if (trouble?.state === "none") return { state: "none", word: "no pool", alert: trouble.text };
  if (trouble) {
    const since = seen ? ` What is shown is ${seconds(ageS())} old.` : "";
    return { state: "away", word: "server away", alert: `${trouble.text}.${since} Trying every second.` };
  }
  if (!seen) return { state: "waiting", word: "connecting" };
  if (ageS() <= STALE_S) return { state: "live", word: "live" };
  const text = `The placement service has not been heard of for ${seconds(ageS())}: these numbers are old.`;
  return { state: "stale", word: "stale", alert: text };
}

function showStanding() {
  const { state, word, alert } = standing();
  set("state", word);
  $("state").dataset.state = state;
  $("alert").hidden = !alert;
  $("alert").dataset.state = state;
  set("alert", alert ?? "");
  $("main").hidden = !seen;
  $("main").classList.toggle("old", state === "away" || state === "stale");
  showLock(state === "locked", trouble?.text);
  $("forget").hidden = !key.value;
}

// --- words and numbers ----------------------------------------------------------------------------------------------

const sum = (list) => list.reduce((total, value) => total + value, 0);

function seconds(value) {
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 120) return `${value.toFixed(0)} s`;
  return value < 7200 ? `${(value / 60).toFixed(0)} min` : `${(value / 3600).toFixed(0)} h`;
}

function bytes(value) {
  const power = value < 1 ? 0 : Math.min(4, Math.floor(Math.log2(value) / 10));
  const number = value / 1024 ** power;
  return `${number.toFixed(power && number < 99.5 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

function range(values) {
  const low = Math.min(...values), high = Math.max(...values);
  return !values.length ? "–" : low === high ? `${low}` : `${low} – ${high}`;
}

// --- tiles and tables -----------------------------------------------------------------------------------------------

function show() {
  showStanding();
  if (!seen) {
    document.title = "Experts · Trinity";
    return;
  }
  showTiles(seen);
  showShards(seen);
  showChanges(seen);
  showBusiest(seen);
  heat.draw();
  document.title = `epoch ${seen.epoch}, ${seen.imbalance.toFixed(2)} · Trinity`;
}

function showTiles(now) {
  const counts = now.replicas.flat().map((held) => held.length);
  const most = counts.reduce((a, b) => Math.max(a, b), 0), notReady = now.shards.filter((shard) => shard.state !== "ready");
  set("pool", `· pool ${now.pool}`);
  set("epoch", plain.format(now.epoch));
  set("imbalance", now.imbalance ? now.imbalance.toFixed(2) : "–");
  set("rows", rate(sum(now.shards.map((shard) => shard.rows_per_s))));
  set("num-shards", plain.format(now.shards.length));
  set("not-ready", notReady.length ? `${notReady.length} not ready` : "all ready");
  set("num-replicas", plain.format(sum(counts)));
  set("most", `of ${several(counts.length, "expert", "experts")}; at most ${most} of one`);
  const [shards, nodes] = now.survives;
  set("survives", shards < 0 ? "experts away" : several(shards, "shard", "shards"));
  set("survives-nodes", shards < 0 ? "their rows wait" : `lost at once; ${several(nodes, "node", "nodes")}`);
  set("recoveries", plain.format(now.num_recoveries));
  set("version", range(now.shards.filter((shard) => shard.state !== "starting").map((shard) => shard.version)));
  set("shape", `${several(now.layers.length, "layer", "layers")} × ${plain.format(now.load[0]?.length ?? 0)} experts`);
}

/** A table's body from rows of cells; a cell is text, or {text, kind, title, part}. */
function fill(id, rows, columns, none) {
  const made = rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map(made_cell));
    return row;
  });
  if (!rows.length) {
    const row = document.createElement("tr"), cell = made_cell({ text: none, kind: "empty" });
    cell.colSpan = columns;
    row.append(cell);
    made.push(row);
  }
  $(id).replaceChildren(...made);
}

function made_cell(cell) {
  const { text = cell, kind = "", title = "", word = null, part = null } = typeof cell === "object" ? cell : {};
  const made = element("td", kind, word === null ? text : element("span", `word ${word}`, text));
  made.title = title;
  if (part !== null) made.append(gauge(part));
  return made;
}

const number = (text) => ({ text, kind: "number" });

function showShards(now) {
  const busiest = Math.max(1e-9, ...now.shards.map((shard) => shard.rows_per_s));
  const rows = now.shards.map((shard) => [
    shard.name,
    { text: shard.state, word: STATES[shard.state] ?? "" },
    { text: shard.host.slice(0, 10) || "–", title: shard.host },
    { text: rate(shard.rows_per_s), kind: "number", part: shard.rows_per_s / busiest },
    number(plain.format(shard.num_replicas)),
    number(bytes(shard.weight_bytes)),
    number(`${shard.version}`),
    { text: shard.computes ? `${shard.expert_dtype} by ${shard.kernels}` : "–", title: shard.computes },
  ]);
  fill("shards", rows, 8, "none");
}

function showChanges(now) {
  const nowS = now.time_s + ageS();
  const rows = now.changes.map((change) => [
    number(plain.format(change.epoch)),
    { text: `${seconds(Math.max(0, nowS - change.started_s))} ago`, title: new Date(change.started_s * 1000).toLocaleString() },
    { text: change.reason, kind: "long" },
    { text: change.phase, word: PHASES[change.phase] ?? "warn" },
    number(change.seconds.toFixed(2)),
    number(plain.format(change.num_copies)),
    number(plain.format(change.num_drops)),
    number(bytes(change.copied_bytes)),
  ]);
  fill("changes", rows, 8, "none yet");
}

function showBusiest(now) {
  const all = now.load.flatMap((row, l) => row.map((value, e) => ({ l, e, value })));
  const top = all.filter((one) => one.value > 0).sort((a, b) => b.value - a.value).slice(0, 10);
  const rows = top.map(({ l, e, value }) => [
    number(`${now.layers[l]}`),
    number(`${e}`),
    number(rate(value)),
    number(`${times(value, mean(now.load[l]))}`),
    { text: holders(now, l, e), kind: "long" },
  ]);
  fill("busiest", rows, 5, "no rows yet");
}

const mean = (row) => sum(row) / Math.max(1, row.length);
const times = (value, of) => (of ? `${(value / of).toFixed(1)}×` : "–");
const holders = (now, l, e) => now.replicas[l][e].map((at) => now.placed[at]).join(", ");

// --- what happens ---------------------------------------------------------------------------------------------------

const heat = new Heat($("heat"));
const repaint = () => {
  heat.mark = undefined;
  heat.draw();
};
$("views").addEventListener("change", (event) => {
  heat.view = event.target.value;
  heat.draw();
});
$("shards").addEventListener("pointerover", (event) => {
  heat.shard = event.target.closest("tr")?.cells[0]?.textContent ?? null;
  heat.draw();
});
$("shards").addEventListener("pointerleave", () => {
  heat.shard = null;
  heat.draw();
});
onUnlock(key, tick);
$("forget").addEventListener("click", () => {
  forget();
  tick();
});
new ResizeObserver(repaint).observe($("frame"));
addEventListener("hashchange", () => {
  if (seen) lookAtLinked();
  heat.draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
document.addEventListener("visibilitychange", tick);
setInterval(showStanding, PERIOD_MS);
tick();
