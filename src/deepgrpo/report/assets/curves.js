// ---- the learning curves

const AXES = [
  ["tokens", "sampled tokens", count],
  ["updates", "optimizer steps", count],
  ["step", "training steps", count],
  ["seconds", "seconds of training", time],
];
// [title, description, unit, format, lowest, highest, [[metric, name, spread]]]; the first one is drawn wide
const CHARTS = [
  ["Accuracy", "On held-out questions, with greedy and with sampled responses. Shade: one standard error.", "accuracy", percent, 0, 1, [["eval/greedy", "greedy", "eval/greedy_se"], ["eval/sampled", "sampled", "eval/sampled_se"]]],
  ["Reward", "Mean over the rollouts of a step, and over its branches, which continue failed rollouts.", "mean reward", number, null, null, [["main/reward", "rollouts"], ["branch/reward", "branches"]]],
  ["Entropy", "Entropy of the policy at trained tokens. Near 0: collapse.", "nats per token", number, 0, null, [["main/entropy", "rollouts"], ["branch/entropy", "branches"]]],
  ["Response length", "Branches are counted without their prefix.", "tokens", number, 0, null, [["main/length", "rollouts"], ["branch/length", "branches"]]],
  ["Mixed groups", "Groups with unequal rewards; only these carry signal.", "share of groups", percent, 0, 1, [["main/mixed", "rollouts"], ["branch/mixed", "branches"]]],
  ["Truncated", "Responses cut off at the length limit.", "share of responses", percent, 0, 1, [["main/truncated", "rollouts"], ["branch/truncated", "branches"]]],
  ["Rescue rate", "Pivots with a branch that succeeds and beats their rollout.", "share of pivots", percent, 0, 1, [["pivots/rescue_rate", "pivots"]]],
  ["Gradient norm", "Before clipping. Spikes point to unusual batches.", "norm", number, 0, null, [["grad_norm", "norm"]]],
];

const colourOf = (run) => `var(--r${run % 8})`;

// The points of a curve: [{x, y, step, spread}]
function pointsOf(run, metric, spreadMetric, axis) {
  const ys = run.curves[metric];
  if (!ys) return [];
  const spread = spreadMetric ? run.curves[spreadMetric] : null;
  const points = [];
  ys.forEach((y, i) => {
    if (y !== null) points.push({ x: run.axes[axis][i], y, step: run.axes.step[i], spread: spread ? spread[i] : 0 });
  });
  return points;
}

// Centred moving average; the window shrinks at both ends.
function smoothed(points, width) {
  if (width < 2) return points;
  const half = Math.floor(width / 2);
  return points.map((p, i) => {
    const near = points.slice(Math.max(0, i - half), i + half + 1);
    return { ...p, y: near.reduce((sum, each) => sum + each.y, 0) / near.length };
  });
}

// Colour identifies the run, dashes the metric.
function runLegend(state, lines, used) {
  const runs = state.runs.flatMap((run, r) => (lines.some((line) => line.run === r) ? [{ name: run.name, colour: colourOf(r), dash: "" }] : []));
  const kinds = used.flatMap(([, name], m) => (lines.some((line) => line.kind === m) ? [{ name, colour: "var(--ink)", dash: DASHES[m % 3] }] : []));
  return kinds.length > 1 ? [...runs, ...kinds] : runs;
}

function drawCurves(state) {
  const [axis, xLabel, xFormat] = AXES.find(([key]) => key === state.axis);
  const many = state.runs.length > 1;
  const chart = ([title, about, unit, format, low, high, metrics], place) => {
    const used = metrics.filter(([metric]) => state.runs.some((run) => run.curves[metric]));
    const lines = state.runs.flatMap((run, r) => (state.hidden.has(r) ? [] : used.map(([metric, name, spread], m) => {
      const raw = pointsOf(run, metric, spread, axis);
      const smooth = metric.startsWith("eval/") ? raw : smoothed(raw, state.smooth);
      const label = many ? (used.length > 1 ? `${run.name} · ${name}` : run.name) : name;
      return { name: label, run: r, kind: m, colour: many ? colourOf(r) : colourOf(m), dash: many ? DASHES[m % 3] : "", points: smooth, raw: smooth === raw ? null : raw };
    }))).filter((line) => line.points.length);
    return lineChart({ title, about, unit, wide: place === 0, format, low, high, xLabel, xFormat, lines, legend: many ? runLegend(state, lines, used) : null });
  };
  for (const host of [byId("charts"), byId("other")]) forget(host);
  byId("charts").replaceChildren(...CHARTS.filter(([, , , , , , metrics]) => state.runs.some((run) => metrics.some(([metric]) => run.curves[metric]))).map((each, i) => chart(each, i)));
  const metric = byId("metric").value;
  byId("other").replaceChildren(...(metric ? [chart([metric, null, null, number, null, null, [[metric, metric]]])] : []));
}

function initCurves(state) {
  byId("axis").append(...AXES.map(([key, label]) =>
    el("label", null, el("input", { type: "radio", name: "axis", value: key, checked: key === state.axis, on: { change: () => { state.axis = key; drawCurves(state); } } }), label)));
  const longest = Math.max(...state.runs.map((run) => run.axes.step.length));
  state.smooth = longest > 400 ? 20 : longest > 120 ? 5 : 1;
  choose(byId("smooth"), [[1, "off"], [5, "5 steps"], [20, "20 steps"], [50, "50 steps"]], state.smooth);
  byId("smooth").addEventListener("change", (event) => {
    state.smooth = Number(event.target.value);
    drawCurves(state);
  });
  if (state.runs.length > 1) {
    byId("shown-runs").append(...state.runs.map((run, r) =>
      el("label", null, el("input", { type: "checkbox", checked: true, on: { change: (event) => { if (event.target.checked) state.hidden.delete(r); else state.hidden.add(r); drawCurves(state); } } }), el("span", null, el("span", { class: "swatch", css: { background: colourOf(r) } }), run.name))));
  } else byId("shown-runs").remove();
  const metrics = [...new Set(state.runs.flatMap((run) => Object.keys(run.curves)))].sort();
  choose(byId("metric"), [["", "choose"], ...metrics.map((key) => [key, key])], "");
  byId("metric").addEventListener("change", () => drawCurves(state));
  drawCurves(state);
}
