"use strict";

// === figures ===

/** How often the server is asked, in ms, and how long an answer may take. */
const POLL = 2000, PATIENCE = 8000;
/** Points of a chart: ten minutes. */
const POINTS = 300;
/** Quantiles are of what was observed between so many polls. */
const LATENCY_POLLS = 5;

/** The quantile q of the observations between two states of a histogram, linear within a bucket; null if there were none. */
function quantile(before, after, q) {
  const counts = after.count.map((n, i) => n - (before ? before.count[i] : 0));
  const total = counts[counts.length - 1];
  if (!(total > 0)) return null;
  const wanted = q * total;
  const at = counts.findIndex((n) => n >= wanted);
  const low = at > 0 ? after.le[at - 1] : 0, high = after.le[at];
  if (high === null) return low;
  const below = at > 0 ? counts[at - 1] : 0;
  return low + (high - low) * (wanted - below) / (counts[at] - below);
}

/** What a counter gained per second between two answers; null without two of the same server. */
function rate(before, after, name) {
  if (!before || !before.counters || !after.counters) return null;
  const seconds = after.uptime_seconds - before.uptime_seconds, gained = after.counters[name] - before.counters[name];
  return seconds > 0 && gained >= 0 ? gained / seconds : null;
}

/** Load over fair share of each expert; 0 everywhere without traffic. */
function shares(tokens) {
  const routes = tokens.reduce((a, b) => a + b, 0);
  return tokens.map((n) => (routes ? n * tokens.length / routes : 0));
}

/** A number with about three digits. */
function figure(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value) || 1)));
  return value.toLocaleString("en", { maximumFractionDigits: Math.min(places, 4) });
}

/** Seconds as a number and its unit. */
function duration(seconds) {
  if (seconds === null || seconds === undefined) return ["–", ""];
  if (seconds < 0.001) return [figure(seconds * 1e6, 2), "µs"];
  return seconds < 1 ? [figure(seconds * 1e3), "ms"] : [figure(seconds), "s"];
}

function percent(share, places = 1) {
  return Number.isFinite(share) ? `${(share * 100).toFixed(places)} %` : "–";
}

function age(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

// === elements ===

const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];

/** Sets text only where it differs, so that nothing is laid out or read out again. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** An element with a class and children; strings become text, never markup. */
function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Names and values of a list, in the elements that are there where they are as many. */
function fill(list, entries) {
  const have = [...list.querySelectorAll("dd")];
  if (have.length === entries.length) entries.forEach(([, value], i) => say(have[i], value));
  else list.replaceChildren(...entries.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))));
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// === colours ===

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function kept(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}

function keep(key, value) {
  try { localStorage.setItem(key, value); } catch { /* private windows keep nothing */ }
}

function applyTheme() {
  const choice = document.querySelector("input[name=theme]:checked").value;
  document.documentElement.dataset.theme = choice === "auto" ? (prefersDark.matches ? "dark" : "light") : choice;
  plots.forEach((plot) => plot.draw());
  heat.restyle();
}

function rgb(hex) {
  const digits = hex.length === 4 ? [...hex.slice(1)].map((d) => d + d) : hex.slice(1).match(/../g);
  return digits.map((d) => parseInt(d, 16));
}

function luminance(channels) {
  const [r, g, b] = channels.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Background and readable ink for a load: blue below the fair share, orange above, full at a quarter and four times. */
function heatColour(load, ends) {
  const place = Math.max(-1, Math.min(1, Math.log2(load) / 2));
  const end = place < 0 ? ends.low : ends.high, share = Math.abs(place) ** 0.85;
  const mixed = ends.even.map((c, i) => Math.round(c + (end[i] - c) * share));
  return { back: `rgb(${mixed.join(",")})`, ink: luminance(mixed) > 0.179 ? "#000" : "#fff" };
}

function heatEnds() {
  return { low: rgb(colour("low")), even: rgb(colour("even")), high: rgb(colour("high")) };
}

// === the heat map ===

const heat = {
  cells: [], ends: [], state: null, shape: "", at: null, colours: null,

  scope: () => document.querySelector("input[name=scope]:checked").value,

  restyle() {
    this.colours = heatEnds();
    this.scale();
    if (this.state) this.draw(this.state);
  },

  scale() {
    const entries = [["0", null], ["¼", 0.25], ["½", 0.5], ["1", 1], ["2", 2], ["≥4", 4]].map(([label, load]) => {
      const swatch = make("i", load === null ? "dead" : "");
      if (load !== null) swatch.style.background = heatColour(load, this.colours).back;
      return make("span", "", swatch, label);
    });
    $("heat-scale").replaceChildren(...entries);
  },

  build(layers) {
    const experts = Math.max(...layers.map((layer) => layer.expert_tokens.length));
    const shape = layers.map((layer) => `${layer.layer}:${layer.expert_tokens.length}`).join();
    if (shape === this.shape) return;
    this.shape = shape;
    $("heat").classList.toggle("many", experts > 16);
    document.querySelector(".pair").classList.toggle("wide", experts > 32);
    $("heat").style.setProperty("--experts", experts);
    $("heat").style.setProperty("--row", `${Math.max(26, Math.min(46, Math.round(184 / layers.length)))}px`);
    const every = experts > 16 ? Math.ceil(experts / 16) : 1;
    const heads = Array.from({ length: experts }, (_, e) => {
      const head = make("th", "", e % every ? "" : String(e));
      head.scope = "col";
      if (every > 1) head.setAttribute("aria-label", `expert ${e}`);
      return head;
    });
    const names = [make("th", "", "layer"), ...heads, make("th", "end", "spread"), make("th", "end", "dead")];
    names[experts + 1].title = "Coefficient of variation of the load: 0 is even";
    names[experts + 2].title = "Experts without a token";
    $("heat").tHead.replaceChildren(make("tr", "", ...names));
    this.cells = layers.map((layer) => layer.expert_tokens.map(() => make("td", "cell none", "–")));
    this.ends = layers.map(() => [make("td", "end", "–"), make("td", "end", "–")]);
    const rows = layers.map((layer, i) => {
      const name = make("th", "", String(layer.layer));
      name.scope = "row";
      const blank = Array.from({ length: experts - this.cells[i].length }, () => make("td"));
      this.cells[i].forEach((cell, e) => { cell.dataset.place = `${i},${e}`; });
      return make("tr", "", name, ...this.cells[i], ...blank, ...this.ends[i]);
    });
    $("heat").tBodies[0].replaceChildren(...rows);
  },

  draw(live) {
    this.state = live;
    const { layers } = live.expert_load[this.scope()];
    if (!layers.length) return;
    this.build(layers);
    layers.forEach((layer, i) => {
      const loads = shares(layer.expert_tokens), traffic = layer.expert_tokens.some((n) => n > 0);
      loads.forEach((load, e) => this.paint(this.cells[i][e], load, traffic));
      say(this.ends[i][0], traffic ? layer.load_cv.toFixed(2) : "–");
      say(this.ends[i][1], traffic ? String(layer.dead_experts) : "–");
    });
    this.read();
  },

  paint(cell, load, traffic) {
    const state = !traffic ? "none" : load === 0 ? "dead" : "";
    cell.classList.toggle("none", state === "none");
    cell.classList.toggle("dead", state === "dead");
    const { back, ink } = state ? { back: "", ink: "" } : heatColour(load, this.colours);
    cell.style.background = back;
    cell.style.color = ink;
    say(cell, !traffic ? "–" : load === 0 ? "0" : load < 10 ? load.toFixed(load < 0.095 ? 2 : 1) : load.toFixed(0));
  },

  /** Moves the reader to a place, and says what is there. Nothing scrolls: a pointer is there already. */
  go(layer, expert) {
    if (this.at) this.cells[this.at[0]]?.[this.at[1]]?.classList.remove("at");
    this.at = [layer, expert];
    this.cells[layer][expert].classList.add("at");
    this.read();
  },

  read() {
    if (!this.at || !this.state) return;
    const [i, e] = this.at, { layers, seconds } = this.state.expert_load[this.scope()];
    const layer = layers[i], tokens = layer?.expert_tokens[e];
    if (tokens === undefined) return;
    const load = shares(layer.expert_tokens)[e];
    say($("heat-read"), `Layer ${layer.layer}, expert ${e}: ${load.toFixed(2)} of its fair share, ${figure(tokens, 9)} tokens in ${age(seconds)}; `
      + `router entropy ${layer.router_entropy.toFixed(2)} nats`);
  },

  move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step || !this.cells.length) return;
    event.preventDefault();
    const [i, e] = this.at ?? [0, 0];
    const row = this.at ? Math.max(0, Math.min(this.cells.length - 1, i + step[0])) : 0;
    const column = this.at ? Math.max(0, Math.min(this.cells[row].length - 1, e + step[1])) : 0;
    this.go(row, column);
    this.cells[row][column].scrollIntoView({ block: "nearest", inline: "nearest" });
    // Not the line that is seen, which changes with the traffic.
    say($("heat-said"), $("heat-read").textContent);
  },
};

// === charts ===

/** Drawn again when colours change. */
const plots = new Map();

function layout(extra) {
  const ink = colour("muted"), grid = colour("grid");
  const axis = { gridcolor: grid, linecolor: grid, tickcolor: grid, zeroline: false, fixedrange: true };
  return {
    margin: { l: 46, r: 10, t: 8, b: 24 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: colour("font"), size: 11, color: ink }, hovermode: "x unified", dragmode: false,
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12 } },
    ...extra, xaxis: { ...axis, showgrid: false, ...extra.xaxis }, yaxis: { ...axis, rangemode: "tozero", nticks: 5, ...extra.yaxis },
  };
}

/** A chart that `describe` says as [traces, layout]; nothing where the library did not load, or where it cannot be seen: it has no size there. */
function chart(id, describe) {
  const draw = () => {
    if (!window.Plotly || !$(id).offsetWidth) return;
    const [traces, extra] = describe();
    window.Plotly.react($(id), traces, layout(extra), { displayModeBar: false, responsive: true, showTips: false });
  };
  plots.set(id, { draw });
}

const points = [];

function timeChart(id, lines, yaxis) {
  chart(id, () => {
    const end = points.length ? points[points.length - 1].time : new Date();
    const first = points.length ? points[0].time : end;
    const begin = new Date(Math.min(Math.max(+first, +end - POINTS * POLL), +end - 60 * POLL));
    const time = points.map((point) => point.time);
    const traces = lines.map(([key, name, series, dash]) => ({
      x: time, y: points.map((point) => point[key]), name, mode: "lines", connectgaps: false,
      line: { color: colour(series), width: dash ? 2 : 2.2, dash: dash || "solid", shape: "linear" },
    }));
    const dtick = end - begin > 5 * 60e3 ? 180e3 : end - begin > 150e3 ? 120e3 : 60e3;
    return [traces, { xaxis: { type: "date", range: [begin, end], tick0: 0, dtick, tickformat: "%H:%M", hoverformat: "%H:%M:%S" }, yaxis }];
  });
}

const SECONDS = { tickformat: "~s", ticksuffix: "s", hoverformat: ".3s" };
timeChart("through-plot", [["generated", "generated", "s1"], ["prompt", "prompt", "s2", "dot"]], { tickformat: "~s", hoverformat: ",.1f" });
timeChart("first-plot", [["first50", "p50", "s1"], ["first95", "p95", "s3", "dot"]], SECONDS);
timeChart("next-plot", [["next50", "p50", "s1"], ["next95", "p95", "s3", "dot"]], SECONDS);
timeChart("requests-plot", [["running", "running", "s1"], ["waiting", "waiting", "s3", "dot"]], { tickformat: "~d", hoverformat: "d" });

// === the fidelity gap ===

let fidelity = null;

chart("gap-plot", () => {
  const layers = fidelity ? fidelity.layers : [];
  const x = layers.map((layer) => String(layer.layer));
  const bars = (key, name, series, pattern) => ({
    x, y: layers.map((layer) => layer[key]), name, type: "bar", marker: { color: colour(series), pattern: { shape: pattern, size: 5, solidity: 0.25 } },
  });
  return [[bars("l2_rel", "relative L2", "s1", ""), bars("missed_mass", "missed mass", "s3", "/")],
    { barmode: "group", bargap: 0.35, xaxis: { type: "category", title: { text: "layer", standoff: 4 } }, yaxis: {}, margin: { l: 46, r: 10, t: 8, b: 36 } }];
});

/** What the card has: nothing while nothing was compared in the chosen time. */
function drawGap(live) {
  const f = live.fidelity[document.querySelector("input[name=gap-scope]:checked").value];
  fidelity = f.tokens > 0 ? f : null;
  ["gap-stats", "gap-plot", "gap-legend", "gap-details"].forEach((id) => { $(id).hidden = !fidelity; });
  $("gap-empty").hidden = Boolean(fidelity);
  say($("gap-basis"), f.enabled ? gapBasis(f) : "");
  if (!fidelity) {
    $("gap-empty").replaceChildren(...noGap(f, live.fidelity.total));
    return;
  }
  fill($("gap-stats"), [["KL, nats", figure(f.kl)], ["same top-1", percent(f.top1_agree)], ["perplexity", signed(f.perplexity_gap)], ["logit L2", figure(f.logit_l2)]]);
  drawGapTable(f.layers);
  const worst = f.layers.reduce((a, b) => (b.l2_rel > a.l2_rel ? b : a), f.layers[0]);
  if (worst) $("gap-plot").setAttribute("aria-label", `Gap of each layer; the largest relative L2 is ${figure(worst.l2_rel)}, in layer ${worst.layer}`);
  plots.get("gap-plot").draw();
}

/** What the figures rest on. */
function gapBasis(f) {
  const dropped = f.dropped ? `; ${figure(f.dropped, 9)} dropped` : "";
  return `In the last ${age(f.seconds)}: ${figure(f.samples, 9)} samples, ${figure(f.tokens, 9)} tokens${dropped}`;
}

/** Why there are no figures of the time that `f` covers. */
function noGap(f, total) {
  if (!f.enabled) return ["Shadow evaluation is off: the server was started with ", make("code", "", "--shadow-budget 0"), "."];
  if (f.same) return [`${figure(f.same, 9)} samples were served as the reference says, so they have no gap.`];
  if (f.other_routing) return [`${figure(f.other_routing, 9)} samples had a routing of their own, so they say nothing of the one in force.`];
  if (total.tokens > 0) return ["Nothing was compared in this time."];
  return ["No request has been measured yet. Figures appear here as traffic flows."];
}

function signed(share) {
  return `${share >= 0 ? "+" : "−"}${percent(Math.abs(share), 2)}`;
}

function drawGapTable(layers) {
  const columns = [["layer", "layer"], ["relative L2", "l2_rel"], ["1 − cosine", "cosine_distance"], ["missed mass", "missed_mass"], ["overlap", "overlap"]];
  const { tHead, tBodies: [body] } = $("gap-table");
  if (!tHead.rows.length) tHead.append(make("tr", "", ...columns.map(([name]) => make("th", "", name))));
  if (body.rows.length !== layers.length) body.replaceChildren(...layers.map(() => make("tr", "", ...columns.map(() => make("td")))));
  layers.forEach((layer, i) => columns.forEach(([, key], j) => say(body.rows[i].cells[j], key === "layer" ? String(layer.layer) : figure(layer[key]))));
}

// === tuning ===

let tuning = null;

/** A chart over the steps of the job: `lines` are [name, points of (step, value), colour, dash]. */
function stepChart(id, lines) {
  chart(id, () => {
    const steps = tuning && tuning.job ? tuning.job.steps : 1;
    const traces = lines().map(([name, at, series, dash]) => ({
      x: at.map((point) => point[0]), y: at.map((point) => point[1]), name, mode: at.length > 40 ? "lines" : "lines+markers", connectgaps: false,
      line: { color: colour(series), width: dash ? 2 : 2.2, dash: dash || "solid" }, marker: { size: 5 },
    }));
    return [traces, { xaxis: { type: "linear", range: [0, Math.max(1, steps)], nticks: 7, tickformat: "~d", hoverformat: "d" }, yaxis: { rangemode: "normal", hoverformat: ".4g" } }];
  });
}

/** The curves of the own gap that differ: where top-1 is what is served, its curve is that one. */
function gapLines() {
  const ends = tuning && tuning.job ? [tuning.job.before, tuning.job.now] : [];
  const own = (key) => ends.some((figures) => figures && figures[key] && figures[key].gap_nats !== figures.serving.gap_nats);
  return [["as served", "serving", "s1", ""], ["top-1", "top1", "s3", "dot"], ["top-2", "top2", "s2", "dot"]]
    .map((line, i) => [...line, i]).filter(([, key]) => key === "serving" || own(key));
}

stepChart("loss-plot", () => [["loss", tuning ? tuning.loss : [], "s1", ""]]);
stepChart("own-plot", () => gapLines().map(([name, , series, dash, i]) => [name, tuning ? tuning.gap.map(([step, values]) => [step, values[i]]) : [], series, dash]));

const JOB_STATES = { running: "good", paused: "warn", done: "good", stopped: "warn", failed: "bad" };

const PUBLISHED = {
  published: (n) => `Generation ${n} was published`, overridden: (n) => `Generation ${n} was published although it did not meet its gates`,
  refused: (n) => `A candidate did not meet its gates, and generation ${n} stayed`, failed: (n) => `A publish failed, and generation ${n} stayed`,
};
const ROLLED_BACK = { asked: "as somebody asked", gap: "because the live gap had grown", errors: "because requests had failed" };

/** What was last put in force, or was to be. */
function switchText({ publish, rollback, generation, seconds_ago: seconds }) {
  const what = publish ? PUBLISHED[publish](generation) : `Generation ${generation} came back, ${ROLLED_BACK[rollback]}`;
  return `${what}, ${age(seconds)} ago.`;
}

function tuningStats(job) {
  const change = (figure_of) => (job.before && job.now ? `${figure_of(job.before.serving)} → ${figure_of(job.now.serving)}`
    : job.before ? figure_of(job.before.serving) : "–");
  const share = job.share === null ? "none" : job.share >= 1 ? "all of it" : percent(job.share, 0);
  return [
    ["steps", `${figure(job.step, 9)} of ${figure(job.steps, 9)}`], ["time left", job.eta_seconds === null ? "–" : age(job.eta_seconds)],
    ["machine share", share], ["loss, nats", figure(job.losses.total)],
    ["own gap, nats", change((of) => figure(of.gap_nats))], ["perplexity ratio", change((of) => figure(of.perplexity_ratio, 4))],
  ];
}

/** The card is there once a job was heard of, or weights were put in force. */
function drawTuning(live) {
  tuning = live.tuning;
  const job = tuning && tuning.job, last = tuning && tuning.switch;
  $("tuning").hidden = !job && !last;
  ["tuning-note", "tuning-state", "tuning-stats", "tuning-curves"].forEach((id) => { $(id).hidden = !job; });
  $("tuning-switch").hidden = !last;
  if (last) say($("tuning-switch"), switchText(last));
  if (!job) return;
  say($("tuning-note"), `Job ${job.job}: ${job.target} under ${job.estimator}`);
  say($("tuning-state"), job.state);
  $("tuning-state").dataset.state = JOB_STATES[job.state] || "wait";
  fill($("tuning-stats"), tuningStats(job));
  const shown = gapLines().map(([, key]) => key);
  ["top1", "top2"].forEach((key) => { $(`own-${key}`).hidden = !shown.includes(key); });
  $("loss-plot").setAttribute("aria-label", `Loss by step; ${figure(job.losses.total)} after ${job.step} of ${job.steps} steps`);
  const gap = (figures) => (figures ? figure(figures.serving.gap_nats) : "not known");
  $("own-plot").setAttribute("aria-label", `Own gap on held-out text by step; before ${gap(job.before)}, now ${gap(job.now)}`);
  ["loss-plot", "own-plot"].forEach((id) => plots.get(id).draw());
}

// === the numbers of this moment ===

/** What the machine is given to, where that is not requests alone. */
const MODES = { tune: "requests, and tuning beside them", tune_exclusive: "tuning alone: requests are refused" };

function drawFacts(live) {
  const f = live.facts || {};
  const facts = [
    ["Serving", f.serving], ["Reference", f.reference], ["Trained with", f.estimator],
    ["Model", f.layers && `${f.layers} layers, ${f.experts === "0" ? "no" : f.experts} experts`], ["Weights", f.dtype && `${f.dtype} on ${f.device}, generation ${f.generation}`],
    ["Machine", MODES[live.mode]], ["Server", f.version && `${f.version}, up ${age(live.uptime_seconds)}`],
  ].filter(([, value]) => value);
  fill($("facts"), facts);
  say($("model"), f.model || "");
  document.title = f.model ? `${f.model} · hardmax` : "hardmax";
}

function tile(id, [number, unit]) {
  say($(id), number);
  say($(`${id}-unit`), unit);
}

function drawTiles(live, point) {
  say($("t-generated"), figure(point.generated));
  say($("t-generated-sub"), `${figure(live.counters.generated_tokens, 12)} in all`);
  say($("t-prompt"), figure(point.prompt));
  say($("t-prompt-sub"), `${figure(live.counters.prompt_tokens, 12)} in all`);
  tile("t-first", duration(point.first95));
  const silent = (what) => (point.known > 0 ? `${what} in the last ${age(point.known)}` : "not known yet");
  say($("t-first-sub"), point.first50 === null ? silent("nobody asked") : `p50 ${duration(point.first50).join(" ")}`);
  tile("t-next", duration(point.next95));
  say($("t-next-sub"), point.next50 === null ? silent("no tokens") : `p50 ${duration(point.next50).join(" ")}`);
  say($("t-running"), figure(live.running));
  const turned = [["rejected", "refused"], ["failed", "failed"]].filter(([name]) => live.counters[name] > 0);
  say($("t-running-sub"), [`${figure(live.waiting)} waiting`, ...turned.map(([name, word]) => `${figure(live.counters[name], 9)} ${word}`)].join(", "));
  say($("t-cache"), (live.cache_usage * 100).toFixed(live.cache_usage < 0.1 ? 1 : 0));
  $("t-cache-bar").style.width = `${Math.min(100, live.cache_usage * 100)}%`;
}

const HEALTH = {
  serving: ["good", "●", "serving"], loading: ["warn", "◌", "loading the model"], draining: ["warn", "◐", "draining"],
  tuning: ["warn", "◐", "tuning, no requests"],
  failed: ["bad", "✕", "the engine has stopped"], lost: ["bad", "✕", "connection lost"],
};

function drawHealth(state) {
  const [level, mark, text] = HEALTH[state] || ["warn", "◌", state];
  $("health").dataset.state = level;
  say($("health").querySelector(".mark"), mark);
  say($("health-text"), text);
}

// === asking the server ===

let answers = [], lastAnswer = 0, timer = 0;

/** One point of the charts out of this answer and those before it. */
function pointOf(live) {
  const before = answers[answers.length - 1], earliest = answers[Math.max(0, answers.length - LATENCY_POLLS)];
  const between = (name, q) => (earliest && earliest[name] ? quantile(earliest[name], live[name], q) : null);
  return {
    time: new Date(), generated: rate(before, live, "generated_tokens"), prompt: rate(before, live, "prompt_tokens"),
    first50: between("time_to_first_token", 0.5), first95: between("time_to_first_token", 0.95),
    next50: between("inter_token_latency", 0.5), next95: between("inter_token_latency", 0.95),
    running: live.running, waiting: live.waiting, known: earliest ? live.uptime_seconds - earliest.uptime_seconds : 0,
  };
}

/** A gap in the lines: nobody looked, or another server answers. */
function breakLines() {
  answers = [];
  if (points.length) points.push({ time: new Date() });
}

function take(live) {
  const last = answers[answers.length - 1];
  if (last && live.uptime_seconds < last.uptime_seconds) breakLines();
  lastAnswer = Date.now();
  drawHealth(live.readiness);
  $("lost").hidden = true;
  // While a server loads, the figures are those of the one before it.
  document.body.classList.toggle("stale", !live.facts);
  drawFacts(live);
  if (!live.facts) return;
  const point = pointOf(live);
  answers = [...answers.slice(1 - LATENCY_POLLS), live];
  points.push(point);
  points.splice(0, points.length - POINTS);
  document.body.classList.toggle("dense", !live.expert_load.total.layers.length);
  drawTiles(live, point);
  heat.draw(live);
  drawGap(live);
  drawTuning(live);
  ["through-plot", "first-plot", "next-plot", "requests-plot"].forEach((id) => plots.get(id).draw());
  $("through-plot").setAttribute("aria-label", `Throughput over time; now ${figure(point.generated)} generated and ${figure(point.prompt)} prompt tokens per second`);
  $("first-plot").setAttribute("aria-label", `Time to first token over time; now p95 ${duration(point.first95).join(" ")}`);
  $("next-plot").setAttribute("aria-label", `Time between tokens over time; now p95 ${duration(point.next95).join(" ")}`);
  $("requests-plot").setAttribute("aria-label", `Requests over time; now ${live.running} running, ${live.waiting} waiting`);
}

function lose() {
  if (answers.length) breakLines();
  drawHealth("lost");
  document.body.classList.add("stale");
  const since = lastAnswer ? `The figures are ${age((Date.now() - lastAnswer) / 1000)} old.` : "There are no figures yet.";
  say($("lost"), `The server does not answer. ${since} Trying again every ${POLL / 1000} s.`);
  $("lost").hidden = false;
}

async function poll() {
  clearTimeout(timer);
  try {
    const response = await fetch("live.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    take(await response.json());
  } catch {
    lose();
  }
  if (!document.hidden) timer = setTimeout(poll, POLL);
}

// === the prompt box ===

const trial = { answer: null, layer: 0, token: 0, abort: null };

/** Eight colours, over and over; the number beside a colour says which expert it is. */
const expertColour = (expert) => `var(--e${expert % 8})`;

function heaviest(routes) {
  return routes.length ? routes.reduce((a, b) => (b[1] > a[1] ? b : a)) : null;
}

/** Text of a token as it can be seen: line ends and lone blanks get signs. */
function visible(text) {
  if (text === "") return [make("span", "sign", "◌")];
  return text.split(/(\n|\t)/).filter(Boolean).map((part) => (part === "\n" ? make("span", "sign", "⏎") : part === "\t" ? make("span", "sign", "⇥") : part));
}

function mixOf(routes) {
  const sum = routes.reduce((a, [, weight]) => a + weight, 0) || 1;
  let from = 0;
  const stops = [...routes].sort((a, b) => b[1] - a[1]).map(([expert, weight]) => {
    const to = from + weight / sum * 100, stop = `${expertColour(expert)} ${from}% ${to}%`;
    from = to;
    return stop;
  });
  return stops.length ? `linear-gradient(90deg, ${stops.join(", ")})` : "none";
}

/** Experts and weights of a token in the chosen layer; none where it was not routed, or where no layer has experts. */
function routesOf(token) {
  return token.routes?.[trial.layer] ?? [];
}

function paintToken(element, token) {
  const routes = routesOf(token), top = heaviest(routes);
  element.style.setProperty("--c", top ? expertColour(top[0]) : "var(--soft)");
  const named = [...routes].sort((a, b) => b[1] - a[1]).slice(0, 2).filter(([, weight], i) => i === 0 || weight >= 0.1);
  say(element.querySelector(".ids"), named.map(([expert]) => expert).join("+") || "–");
  element.querySelector(".mix").style.background = mixOf(routes);
  const ways = named.map(([expert, weight]) => `expert ${expert} weight ${weight.toFixed(2)}`).join(", ");
  element.setAttribute("aria-label", `${JSON.stringify(token.text)}, ${ways || "not routed"}`);
}

function drawTokens() {
  const { tokens } = trial.answer;
  const element = (token, i) => {
    const button = make("button", "token", make("span", "text", ...visible(token.text)), make("span", "mix moe"), make("span", "ids moe"));
    button.type = "button";
    button.dataset.token = i;
    button.tabIndex = i === trial.token ? 0 : -1;
    paintToken(button, token);
    return button;
  };
  const first = tokens.findIndex((token) => token.generated), split = first < 0 ? tokens.length : first;
  const elements = tokens.map(element);
  const group = (name, part) => (part.length ? [make("h3", "", name), ...part] : []);
  $("tokens").replaceChildren(...group("Prompt", elements.slice(0, split)), ...group("Continuation", elements.slice(split)));
}

function drawExperts() {
  const counts = new Map();
  trial.answer.tokens.forEach((token) => {
    const top = heaviest(routesOf(token));
    if (top) counts.set(top[0], (counts.get(top[0]) || 0) + 1);
  });
  const entries = [...counts].sort((a, b) => b[1] - a[1]).map(([expert, count]) => {
    const entry = make("li", "", make("i"), `expert ${expert}: ${count}`);
    entry.style.setProperty("--c", expertColour(expert));
    return entry;
  });
  $("experts").replaceChildren(...entries);
}

/** Why a token has no experts. */
function unrouted(token) {
  if (!trial.answer.layers.length) return "This model has no experts.";
  return token.generated ? "The last token is not read by the model, so it has no experts." : "It was not routed.";
}

function drawDetails() {
  const token = trial.answer.tokens[trial.token];
  all("#tokens .token").forEach((element) => element.classList.toggle("at", Number(element.dataset.token) === trial.token));
  const title = make("h3", "", token.text === "" ? "(part of a character)" : JSON.stringify(token.text).slice(1, -1));
  const note = make("p", "note", `token ${token.id}, position ${trial.token}, ${token.generated ? "generated" : "of the prompt"}`);
  if (!token.routes || !trial.answer.layers.length) {
    $("details").replaceChildren(title, note, make("p", "empty", unrouted(token)));
    return;
  }
  const rows = trial.answer.layers.map((layer, i) => {
    const ways = [...token.routes[i]].sort((a, b) => b[1] - a[1]).map(([expert, weight]) => {
      const way = make("span", "way", make("i"), `${expert} · ${weight.toFixed(2)}`);
      way.style.setProperty("--c", expertColour(expert));
      return way;
    });
    const margin = token.margin[i] === null ? "–" : figure(token.margin[i], 2);
    const row = make("tr", i === trial.layer ? "on" : "", make("th", "", String(layer)), make("td", "", ...ways), make("td", "", figure(token.entropy[i], 2)), make("td", "", margin));
    row.firstChild.scope = "row";
    return row;
  });
  const names = [["layer"], ["expert · weight"], ["entropy", "Of the router's softmax, in nats"], ["margin", "Last chosen logit over the first refused one: near 0 is a near tie"]];
  const head = make("tr", "", ...names.map(([name, title]) => { const th = make("th", "", name); th.scope = "col"; if (title) th.title = title; return th; }));
  const scroll = make("div", "scroll", make("table", "", make("thead", "", head), make("tbody", "", ...rows)));
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "group");
  scroll.setAttribute("aria-label", "Experts of this token by layer");
  $("details").replaceChildren(title, note, scroll);
}

function chooseToken(i, focus) {
  trial.token = i;
  all("#tokens .token").forEach((element) => {
    const chosen = Number(element.dataset.token) === i;
    element.tabIndex = chosen ? 0 : -1;
    if (chosen && focus) element.focus();
  });
  drawDetails();
}

function chooseLayer() {
  trial.layer = Number($("layer").value);
  all("#tokens .token").forEach((element) => paintToken(element, trial.answer.tokens[Number(element.dataset.token)]));
  drawExperts();
  drawDetails();
}

function moveToken(event) {
  const last = trial.answer.tokens.length - 1;
  const to = { ArrowLeft: trial.token - 1, ArrowRight: trial.token + 1, ArrowUp: trial.token - 10, ArrowDown: trial.token + 10, Home: 0, End: last }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  chooseToken(Math.max(0, Math.min(last, to)), true);
}

function showAnswer(answer) {
  Object.assign(trial, { answer, layer: Math.min(trial.layer, Math.max(0, answer.layers.length - 1)), token: 0 });
  const generated = answer.tokens.filter((token) => token.generated).length;
  const speed = generated > 1 && answer.decode_seconds > 0 ? `, ${figure((generated - 1) / answer.decode_seconds)} tokens/s` : "";
  say($("result-note"), `${answer.tokens.length - generated} + ${generated} tokens under ${answer.routing}; first token after ${duration(answer.first_token_seconds).join(" ")}${speed}`);
  $("layer").replaceChildren(...answer.layers.map((layer, i) => new Option(`layer ${layer}`, i, i === trial.layer, i === trial.layer)));
  $("result").hidden = false;
  drawTokens();
  drawExperts();
  drawDetails();
}

const FIELDS = { prompt: "try-prompt", max_new_tokens: "try-tokens", routing: "try-routing" };

function showError(field, message) {
  const named = { prompt: "The prompt: ", max_new_tokens: "New tokens: ", routing: "The routing: " }[field] || "";
  say($("try-error"), message ? named + message : "");
  Object.entries(FIELDS).forEach(([name, id]) => {
    if (name === field) $(id).setAttribute("aria-invalid", "true"); else $(id).removeAttribute("aria-invalid");
  });
  // Of several buttons, the one that is chosen.
  if (FIELDS[field]) (document.querySelector(`#${FIELDS[field]} input:checked`) ?? $(FIELDS[field])).focus();
}

function runningTrial(on) {
  say($("try-go"), on ? "Stop" : "Run");
  $("try-go").classList.toggle("stop", on);
  $("result").setAttribute("aria-busy", String(on));
}

async function tryPrompt() {
  const tokens = $("try-tokens").valueAsNumber, routing = document.querySelector("input[name=routing]:checked").value;
  showError("", "");
  if (!$("try-prompt").value) return showError("prompt", "write something");
  if (!Number.isInteger(tokens) || tokens < 1) return showError("max_new_tokens", "a whole number from 1");
  const trying = { prompt: $("try-prompt").value, max_new_tokens: tokens, ...(routing && { routing }) };
  trial.abort = new AbortController();
  runningTrial(true);
  try {
    const response = await fetch("try", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(trying), signal: trial.abort.signal,
    });
    const answer = await response.json();
    if (response.ok) showAnswer(answer); else showError(answer.field, answer.message);
  } catch (error) {
    showError("", error.name === "AbortError" ? "stopped" : "the server does not answer");
  } finally {
    trial.abort = null;
    runningTrial(false);
  }
}

// === start ===

function listen() {
  all("input[name=theme]").forEach((input) => input.addEventListener("change", () => { keep("theme", input.value); applyTheme(); }));
  prefersDark.addEventListener("change", applyTheme);
  all("input[name=scope]").forEach((input) => input.addEventListener("change", () => heat.restyle()));
  all("input[name=gap-scope]").forEach((input) => input.addEventListener("change", () => { if (answers.length) drawGap(answers.at(-1)); }));
  const place = (event) => event.target.closest("[data-place]")?.dataset.place.split(",").map(Number);
  ["pointerover", "click"].forEach((kind) => $("heat").addEventListener(kind, (event) => { const at = place(event); if (at) heat.go(...at); }));
  $("heat-frame").addEventListener("keydown", (event) => heat.move(event));
  $("try-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (trial.abort) trial.abort.abort(); else tryPrompt();
  });
  const token = (event) => event.target.closest("[data-token]")?.dataset.token;
  ["pointerover", "focusin", "click"].forEach((kind) => $("tokens").addEventListener(kind, (event) => {
    const i = token(event);
    if (i !== undefined && Number(i) !== trial.token) chooseToken(Number(i), false);
  }));
  $("tokens").addEventListener("keydown", moveToken);
  $("layer").addEventListener("change", chooseLayer);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { breakLines(); poll(); } });
}

function start() {
  const theme = kept("theme");
  const input = theme && all("input[name=theme]").find((candidate) => candidate.value === theme);
  if (input) input.checked = true;
  listen();
  applyTheme();
  poll();
}

start();
