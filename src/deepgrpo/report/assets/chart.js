// ---- line charts: one per metric, all runs in one chart

const MARGIN = { left: 60, right: 20, top: 10, bottom: 36 };
const HEIGHT = 210;
const DASHES = ["", "5 3", "1.5 3"];

// spec: { title, about, unit, wide, format, low, high, xLabel, xFormat, lines: [{ name, colour, dash, points: [{x, y, step, spread}] }] }
// legend: entries if they are not one per line: [{ name, colour, dash }]
function lineChart(spec) {
  const lines = spec.lines.filter((line) => line.points.length);
  const host = el("div", { class: "plot", tabindex: "0", role: "group", "aria-label": summary(spec, lines) });
  const card = el("figure", { class: spec.wide ? "card wide" : "card", "data-chart": spec.title }, el("h3", null, spec.title), spec.about && el("p", null, spec.about), legend(spec.legend || lines), host);
  if (!lines.length) {
    host.append(el("div", { class: "empty" }, "not in these runs"));
    host.removeAttribute("tabindex");
    return card;
  }
  requestAnimationFrame(() => drawWide(host, (width) => drawLines(host, width, spec, lines)));
  return card;
}

function summary(spec, lines) {
  const parts = lines.map((line) => {
    const first = line.points[0], last = line.points[line.points.length - 1];
    return `${line.name} from ${spec.format(first.y)} to ${spec.format(last.y)}`;
  });
  return `${spec.title} over ${spec.xLabel}: ${parts.join("; ") || "no data"}. Arrow keys read out the points.`;
}

function legend(lines) {
  return el("div", { class: "legend" }, lines.map((line) =>
    el("span", null, svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" },
      svg("line", { x1: 0, y1: 4, x2: 22, y2: 4, "stroke-width": 2.5, "stroke-dasharray": line.dash, css: { stroke: line.colour } })), line.name)));
}

function drawLines(host, width, spec, lines) {
  const inner = { w: width - MARGIN.left - MARGIN.right, h: HEIGHT - MARGIN.top - MARGIN.bottom };
  const all = lines.flatMap((line) => line.points);
  const xs = extent(all.map((p) => p.x), 0);
  const ys = extent(all.flatMap((p) => [p.y - (p.spread || 0), p.y + (p.spread || 0)]), null, spec.low, spec.high, spec.format === percent ? 0.05 : 0);
  const x = (v) => MARGIN.left + (inner.w * (v - xs[0])) / (xs[1] - xs[0]);
  const y = (v) => MARGIN.top + inner.h - (inner.h * (v - ys[0])) / (ys[1] - ys[0]);
  const root = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, "aria-hidden": "true" });
  for (const tick of ticks(ys[0], ys[1], 6)) {
    root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }));
    root.append(svg("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, spec.format(tick)));
  }
  for (const tick of ticks(xs[0], xs[1], Math.min(10, width / 70))) {
    root.append(svg("line", { class: "axis", x1: x(tick), x2: x(tick), y1: HEIGHT - MARGIN.bottom, y2: HEIGHT - MARGIN.bottom + 4 }));
    root.append(svg("text", { x: x(tick), y: HEIGHT - MARGIN.bottom + 16, "text-anchor": "middle" }, spec.xFormat(tick)));
  }
  root.append(svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(ys[0]), y2: y(ys[0]) }));
  root.append(...axisNames(width, HEIGHT, spec.xLabel, spec.unit));
  for (const line of lines) {
    const spread = line.points.filter((p) => p.spread);
    if (spread.length > 1) {
      const band = [...spread.map((p) => [x(p.x), y(p.y + p.spread)]), ...spread.slice().reverse().map((p) => [x(p.x), y(p.y - p.spread)])];
      root.append(svg("path", { d: path(band) + "Z", "fill-opacity": 0.13, css: { fill: line.colour } }));
    }
    if (line.raw) root.append(svg("path", { d: path(line.raw.map((p) => [x(p.x), y(clamp(p.y, ys))])), fill: "none", "stroke-width": 1, "stroke-opacity": 0.28, css: { stroke: line.colour } }));
    root.append(svg("path", { d: path(line.points.map((p) => [x(p.x), y(p.y)])), fill: "none", "stroke-width": 1.9, "stroke-linejoin": "round", "stroke-dasharray": line.dash, css: { stroke: line.colour } }));
    if (line.points.length < 40) for (const p of line.points) root.append(svg("circle", { cx: x(p.x), cy: y(p.y), r: 2.4, css: { fill: line.colour } }));
  }
  const mark = svg("g", { "pointer-events": "none" });
  root.append(mark);
  host.replaceChildren(root);
  follow(host, root, width, { x, y, xs, lines, spec, mark });
}

// Labels of the two axes.
function axisNames(width, height, across, up) {
  const middle = (MARGIN.top + height - MARGIN.bottom) / 2;
  return [
    svg("text", { class: "name", x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 4, "text-anchor": "middle" }, across),
    up ? svg("text", { class: "name", x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, up) : "",
  ];
}

// The cursor: every line's value nearest to the pointer, or to where the arrow keys are.
function follow(host, root, width, view) {
  const stops = [...new Set(view.lines.flatMap((line) => line.points.map((p) => p.x)))].sort((a, b) => a - b);
  let at = -1;
  const show = (value, px, py) => {
    view.mark.replaceChildren(svg("line", { class: "cursor", x1: view.x(value), x2: view.x(value), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    const rows = view.lines.map((line) => {
      const p = line.points.reduce((best, each) => (Math.abs(each.x - value) < Math.abs(best.x - value) ? each : best));
      view.mark.append(svg("circle", { cx: view.x(p.x), cy: view.y(p.y), r: 4, css: { fill: line.colour } }));
      const spread = p.spread ? ` ± ${view.spec.format(p.spread)}` : "";
      return el("div", null, el("span", { class: "swatch", css: { background: line.colour } }), `${line.name}  `, el("b", null, view.spec.format(p.y)), `${spread}  (step ${p.step})`);
    });
    tip.show(px, py, el("div", null, `${view.spec.xFormat(value)} ${view.spec.xLabel}`), rows);
  };
  const hide = () => {
    view.mark.replaceChildren();
    tip.hide();
  };
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect();
    const wanted = view.xs[0] + ((view.xs[1] - view.xs[0]) * (((event.clientX - box.left) * width) / box.width - MARGIN.left)) / (width - MARGIN.left - MARGIN.right);
    at = nearestIndex(stops, wanted);
    show(stops[at], event.clientX, event.clientY);
  });
  root.addEventListener("pointerleave", hide);
  host.onblur = hide;
  host.onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.max(0, Math.min(stops.length - 1, at + move));
    const box = root.getBoundingClientRect();
    show(stops[at], box.left + (view.x(stops[at]) * box.width) / width, box.top + 20);
    tip.speak();
  };
}

const clamp = (v, [low, high]) => Math.max(low, Math.min(high, v));
const path = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)},${b.toFixed(1)}`).join("");

function nearestIndex(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - wanted) <= Math.abs(sorted[high] - wanted) ? low : high;
}

// Range of an axis: the data with a margin, at least `least`, within the bounds of the metric.
function extent(values, from, low, high, least = 0) {
  let a = values.reduce((m, v) => Math.min(m, v), Infinity);
  let b = values.reduce((m, v) => Math.max(m, v), -Infinity);
  if (from !== null && from !== undefined) a = Math.min(a, from);
  if (a === b) {
    const room = Math.abs(a) * 0.1 || 0.5;
    a -= room;
    b += room;
  } else if (from === null) {
    const room = (b - a) * 0.08;
    a -= room;
    b += room;
  }
  if (b - a < least) [a, b] = [(a + b - least) / 2, (a + b + least) / 2];
  if (low !== null && low !== undefined && a < low) [a, b] = [low, Math.max(b, low + least)];
  if (high !== null && high !== undefined && b > high) [a, b] = [Math.min(a, high - least), high];
  if (low !== null && low !== undefined) a = Math.max(a, low);
  if (high !== null && high !== undefined) b = Math.min(b, high);
  return a < b ? [a, b] : [a - 0.5, a + 0.5];
}
