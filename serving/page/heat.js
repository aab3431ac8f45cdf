// The heat map: layers down, experts across. Reads `seen`, which dashboard.js keeps; one script together with it.

const LEFT = 34, ABOVE = 6, BELOW = 18, NARROWEST = 3, LOWEST = 7, HIGHEST = 30, TALL = 470;
const HOT = 0.995;  // of the experts decide the scale: one that is far hotter than all others would pale them

class Heat {
  constructor(canvas) {
    this.canvas = canvas;
    this.view = "load";
    this.at = null;       // the cell looked at
    this.shard = null;    // the shard looked at, by name
    this.movedAt = new Map();
    const move = (event) => this.look(this.cell(event));
    canvas.addEventListener("pointermove", move);
    canvas.addEventListener("pointerdown", move);
    canvas.addEventListener("pointerleave", () => document.activeElement !== canvas && this.look(null));
    canvas.addEventListener("blur", () => this.look(null));
    canvas.addEventListener("keydown", (event) => this.step(event));
  }

  /** Remember which experts' replicas moved with this snapshot. */
  follow(before, now) {
    if (!before || before.epoch === now.epoch || before.layers.length !== now.layers.length) return;
    for (let l = 0; l < now.layers.length; l++)
      for (let e = 0; e < now.replicas[l].length; e++)
        if (before.replicas[l][e] && holders(before, l, e) !== holders(now, l, e)) this.movedAt.set(l * 65536 + e, performance.now());
  }

  look(at) {
    this.at = at;
    this.draw();
  }

  cell(event) {
    const { cw, ch, L, E } = this.size ?? {};
    const e = Math.floor((event.offsetX - LEFT) / cw), l = Math.floor((event.offsetY - ABOVE) / ch);
    return e >= 0 && e < E && l >= 0 && l < L ? { l, e } : null;
  }

  step(event) {
    const [dl, de] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (dl === undefined || !this.size) return;
    event.preventDefault();
    const { L, E } = this.size, { l, e } = this.at ?? { l: -dl, e: -de };
    this.look({ l: Math.min(L - 1, Math.max(0, l + dl)), e: Math.min(E - 1, Math.max(0, e + de)) });
    set("spoken", $("readout").textContent);
  }

  draw() {
    if (!seen || $("main").hidden) return;
    this.measure();
    const { ctx, L, E } = this.size;
    const paint = this.paint();
    for (let l = 0; l < L; l++) for (let e = 0; e < E; e++) this.drawCell(l, e, paint);
    ctx.globalAlpha = 1;
    this.drawMoved();
    this.drawLabels();
    if (this.at) this.outline(this.at.l, this.at.e, this.colour("--cursor"), 2);
    this.tell(paint);
  }

  measure() {
    const L = seen.layers.length, E = Math.max(1, seen.load[0]?.length ?? 0), dpr = devicePixelRatio || 1;
    const width = Math.max($("frame").clientWidth, LEFT + E * NARROWEST);
    const cw = (width - LEFT) / E, ch = Math.min(HIGHEST, Math.max(LOWEST, Math.floor(TALL / Math.max(1, L))));
    const height = ABOVE + L * ch + BELOW, { canvas } = this;
    if (canvas.width !== Math.round(width * dpr) || canvas.height !== Math.round(height * dpr)) {
      canvas.width = Math.round(width * dpr);
      canvas.height = Math.round(height * dpr);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    const ctx = canvas.getContext("2d");
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
    ctx.clearRect(0, 0, width, height);
    this.size = { ctx, L, E, cw, ch, width, dpr };
    this.style = getComputedStyle(document.documentElement);
  }

  colour(name) {
    return this.style.getPropertyValue(name).trim();
  }

  /** How a cell's value becomes a place on the ramp, 0 to 1, and what the ends of the ramp are called. */
  paint() {
    const stops = this.colour("--ramp").split(",").map(rgb);
    const shades = Array.from({ length: 64 }, (_, i) => blend(stops, i / 63));
    if (this.view === "replicas") {
      const most = Math.max(2, seen.replicas.flat().reduce((a, held) => Math.max(a, held.length), 1));
      const value = (l, e) => seen.replicas[l][e].length;
      return { shades, value, place: (v) => (v - 1) / (most - 1), text: (v) => `${v}`, low: "1", high: `${most}` };
    }
    if (this.view === "share") {
      const means = seen.load.map(mean);
      const value = (l, e) => (means[l] ? seen.load[l][e] / means[l] : 0);
      const place = (v) => (v ? (Math.log2(v) + 3) / 6 : 0);
      return { shades, value, place, text: (v) => v.toFixed(1), low: "⅛ of the mean", high: "8 times" };
    }
    const sorted = Float64Array.from(seen.load.flat()).sort(), last = sorted.length - 1;
    const high = sorted[Math.floor(HOT * last)] ?? 0, most = ceiling(high * 1.5 < sorted[last] ? high : sorted[last]);
    const value = (l, e) => seen.load[l][e], sign = sorted[last] > most ? "≥ " : "";
    return { shades, value, place: (v) => Math.sqrt(v / most), text: rate, low: "0", high: `${sign}${rate(most)} rows/s` };
  }

  /** Edges on whole device pixels, so that narrow columns have no seams. */
  box(l, e) {
    const { cw, ch, dpr } = this.size, gap = cw >= 6 ? 1 : 0;
    const x = Math.round((LEFT + e * cw) * dpr) / dpr, right = Math.round((LEFT + (e + 1) * cw) * dpr) / dpr;
    return [x, ABOVE + l * ch, right - x - gap, ch - (ch >= 6 && gap ? 1 : 0)];
  }

  drawCell(l, e, { shades, value, place, text }) {
    const { ctx, cw, ch } = this.size, [x, y, w, h] = this.box(l, e), held = seen.replicas[l][e], v = value(l, e);
    const shade = shades[Math.round(63 * Math.min(1, Math.max(0, place(v))))];
    ctx.globalAlpha = this.shard === null || held.some((at) => seen.placed[at] === this.shard) ? 1 : 0.12;
    ctx.fillStyle = shade.css;
    ctx.fillRect(x, y, w, h);
    if (cw >= 38 && ch >= 16) {
      ctx.fillStyle = shade.light ? "#10151c" : "#ffffff";
      ctx.font = "11px system-ui, 'DejaVu Sans', sans-serif";
      ctx.textAlign = "center";
      ctx.textBaseline = "middle";
      ctx.fillText(text(v), x + w / 2, y + h / 2 + 0.5);
    }
    if (held.length > 1 && this.view !== "replicas") this.drawMark(x, y, w, h);
  }

  drawMark(x, y, w, h) {
    const { ctx, cw } = this.size, big = cw >= 14 && h >= 12;
    ctx.fillStyle = this.mark ??= this.colour("--replica");
    ctx.beginPath();
    if (big) ctx.arc(x + w - 5, y + 5, 3, 0, 7);
    else ctx.rect(x, y + h - 2, w, 2);
    ctx.fill();
  }

  drawMoved() {
    const now = performance.now(), colour = this.colour("--moved");
    for (const [cell, at] of this.movedAt)
      if (now - at > MOVED_MS) this.movedAt.delete(cell);
      else this.outline(Math.floor(cell / 65536), cell % 65536, colour, 2);
  }

  outline(l, e, colour, width) {
    const { ctx, L, E } = this.size;
    if (l >= L || e >= E) return;
    const [x, y, w, h] = this.box(l, e);
    ctx.strokeStyle = colour;
    ctx.lineWidth = width;
    ctx.strokeRect(x - width / 2 + 0.5, y - width / 2 + 0.5, w + width - 1, h + width - 1);
  }

  drawLabels() {
    const { ctx, L, E, cw, ch } = this.size;
    ctx.fillStyle = this.colour("--soft");
    ctx.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    const everyL = every(14 / ch), everyE = every(30 / cw);
    for (let l = 0; l < L; l += everyL) ctx.fillText(seen.layers[l], LEFT - 6, ABOVE + (l + 0.5) * ch);
    ctx.textAlign = "center";
    for (let e = 0; e < E; e += everyE) ctx.fillText(e, LEFT + (e + 0.5) * cw, ABOVE + L * ch + BELOW / 2 + 2);
  }

  tell({ shades, low, high }) {
    set("low", low);
    set("high", high);
    const steps = shades.filter((_, i) => i % 9 === 0).map((shade) => shade.css);
    $("ramp").style.background = `linear-gradient(to right, ${steps.join(", ")})`;
    set("readout", this.at && this.at.l < this.size.L && this.at.e < this.size.E ? this.words(this.at) : "Point at an expert, or use the arrow keys. Point at a shard to see its experts.");
    const many = seen.replicas.flat().filter((held) => held.length > 1).length;
    this.canvas.setAttribute("aria-label", `Heat map, layers down, experts across; ${many} experts have several replicas. The busiest are listed below.`);
  }

  words({ l, e }) {
    const held = seen.replicas[l][e], load = seen.load[l][e];
    const where = held.map((at) => {
      const shard = seen.shards.find((one) => one.name === seen.placed[at]);
      return shard?.host ? `${seen.placed[at]} (node ${shard.host.slice(0, 10)})` : seen.placed[at];
    });
    const much = `${rate(load)} rows/s, ${times(load, mean(seen.load[l]))} the layer's mean`;
    return `Layer ${seen.layers[l]}, expert ${e}: ${much}; ${several(held.length, "replica", "replicas")} on ${where.join(", ")}`;
  }
}

function rgb(text) {
  const value = parseInt(text.trim().slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function blend(stops, place) {
  const at = place * (stops.length - 1), low = Math.min(stops.length - 2, Math.floor(at)), part = at - low;
  const mixed = stops[low].map((value, i) => Math.round(value + part * (stops[low + 1][i] - value)));
  const light = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] > 140;
  return { css: `rgb(${mixed.join(",")})`, light };
}

/** The next round number: a scale that does not change each second. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((digit) => digit * power >= value) * power;
}

const every = (least) => [1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128, 256, 512].find((step) => step >= least) ?? 1024;
