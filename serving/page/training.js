// Curves of the training run whose weights are served: asked for beside the snapshot, drawn on canvases.

const TRAINING_MS = 2000, NO_RUN_MS = 15000, HEIGHT = 130, MARGIN = { left: 52, right: 8, above: 16, below: 18 };
const CURVES = [
  { id: "curve-loss", name: "loss", digits: 3, marks: true },
  { id: "curve-tokens", name: "tokens_per_s", digits: 0 },
  { id: "curve-mfu", name: "mfu", digits: 1, times: 100 },
  { id: "curve-vio", name: "max_vio", digits: 2 },
];
let training = null, trainingTimer = 0;

async function askTraining() {
  clearTimeout(trainingTimer);
  if (seen && !document.hidden) {
    try {
      const options = { headers: key.headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(TIMEOUT_MS) };
      const answer = await fetch("dashboard/training", options);
      if (answer.ok) training = await answer.json();
    } catch {
      // who asks for the snapshot says it
    }
    showTraining();
  }
  trainingTimer = setTimeout(askTraining, training && !training.run ? NO_RUN_MS : TRAINING_MS);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (value, digits) => (Math.abs(value) >= 1e4 ? compact.format(value) : value.toFixed(digits));

function showTraining() {
  const stages = training?.run?.stages ?? [];
  $("training").hidden = !stages.length;
  if (!stages.length) return;
  const now = stages.at(-1), total = now.steps ? ` of ${plain.format(now.steps)}` : "";
  const named = now.name ? `stage ${stages.length}, ${now.name}: ` : "";
  set("training-at", `${named}step ${plain.format(now.last - now.first)}${total}; weights of version ${plain.format(training.version)} are served`);
  const retries = {};
  for (const stage of stages) for (const [reason, num] of Object.entries(stage.retries)) retries[reason] = (retries[reason] ?? 0) + num;
  const facts = [
    ["Quarantined versions", plain.format(training.quarantined)],
    ["Steps skipped", plain.format(sum(stages.map((stage) => stage.skipped)))],
    ...Object.entries(retries).map(([reason, num]) => [`Retries, ${reason.replaceAll("_", " ")}`, plain.format(num)]),
    ...training.run.exports.map(([step, name]) => [`Export ${name}`, `step ${plain.format(step)}`]),
  ];
  fill("training-facts", facts.map(([what, value]) => [{ text: what, kind: "long" }, number(value)]), 2, "none");
  showScores(stages.flatMap((stage) => stage.scores));
  for (const curve of CURVES) drawCurve(curve, stages);
}

/** The last scores of each task, and whether its gate is open. */
function showScores(scores) {
  const last = new Map(scores.map((score) => [score.task, score]));
  const rows = [...last.values()].map((score) => [
    { text: score.task, kind: "long" },
    number(score.mean === null ? "nan" : score.mean.toFixed(3)),
    "passes" in score ? { text: score.passes ? "open" : "closed", word: score.passes ? "good" : "bad" } : "–",
    number(plain.format(score.step)),
  ]);
  $("training-scores").closest("table").hidden = !rows.length;
  fill("training-scores", rows, 4, "none");
}

function drawCurve({ id, name, digits, times = 1, marks = false }, stages) {
  const canvas = $(id), points = stages.flatMap((stage) =>
    (stage.curves[name] ?? []).map((value, at) => [stage.curves.step[at], value]).filter(([, value]) => value !== null));
  canvas.parentElement.hidden = !points.length;
  if (!points.length) return;
  const held = marks ? stages.flatMap((stage) => stage.validations) : [];
  const all = [...points, ...held].map(([, value]) => value * times), low = marks ? Math.min(...all) : 0, high = Math.max(...all, low + 1e-9);
  const width = canvas.parentElement.clientWidth, dpr = devicePixelRatio || 1, end = Math.max(...points.map(([step]) => step), 1);
  Object.assign(canvas, { width: Math.round(width * dpr), height: Math.round(HEIGHT * dpr) });
  const ctx = canvas.getContext("2d"), bottom = HEIGHT - MARGIN.below;
  ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
  const x = (step) => MARGIN.left + (step / end) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - MARGIN.above);
  ctx.font = "11px system-ui, sans-serif";
  ctx.fillStyle = colour("--soft");
  ctx.textAlign = "right";
  for (const value of [low, high]) ctx.fillText(short(value, digits), MARGIN.left - 6, y(value) + 4);
  ctx.fillText(plain.format(end), width - MARGIN.right, HEIGHT - 4);
  ctx.strokeStyle = colour("--line");
  ctx.strokeRect(MARGIN.left, MARGIN.above, width - MARGIN.left - MARGIN.right, bottom - MARGIN.above);
  markStages(ctx, stages, x, bottom, marks);
  ctx.strokeStyle = colour("--accent");
  ctx.lineWidth = 1.5;
  ctx.beginPath();
  points.forEach(([step, value], at) => (at ? ctx.lineTo(x(step), y(value * times)) : ctx.moveTo(x(step), y(value * times))));
  ctx.stroke();
  ctx.fillStyle = colour("--replica");
  for (const [step, value] of held) ctx.fillRect(x(step) - 2, y(value) - 2, 4, 4);
  const [, latest] = points.at(-1);
  canvas.setAttribute("aria-label", `${canvas.title}: ${short(latest * times, digits)} at step ${end}`);
  set(`${id}-now`, short(latest * times, digits));
}

function markStages(ctx, stages, x, bottom, isNamed) {
  ctx.textAlign = "left";
  ctx.setLineDash([2, 3]);
  for (const stage of stages) {
    if (stage.first) {
      ctx.beginPath();
      ctx.moveTo(x(stage.first), MARGIN.above);
      ctx.lineTo(x(stage.first), bottom);
      ctx.stroke();
    }
    if (isNamed && stage.name) ctx.fillText(stage.name, x(stage.first) + 3, MARGIN.above - 4);
  }
  ctx.setLineDash([]);
}

new ResizeObserver(showTraining).observe($("training"));
askTraining();
