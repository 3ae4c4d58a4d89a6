// ---- heat maps (steps × depth), and predicted against observed success

// table: { steps: [[first, last]], cells: [C][10], counts: [C][10] } as made by pivots.py
function heatmap(spec, table) {
  const card = el("figure", { class: "card", "data-chart": spec.title }, el("h3", null, spec.title), el("p", null, spec.about));
  if (!table) {
    card.append(el("div", { class: "empty" }, spec.none));
    return card;
  }
  const top = table.cells.flat().reduce((m, v) => Math.max(m, v ?? 0), 0) || 1;
  const high = spec.full ? 1 : top;
  const host = el("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${spec.title}. Arrow keys read out the cells.` });
  const ramp = svg("svg", { viewBox: "0 0 60 8", "aria-hidden": "true" }, [0.1, 0.3, 0.5, 0.7, 0.9].map((v, i) =>
    svg("rect", { x: 12 * i, y: 0, width: 12, height: 8, "fill-opacity": shade(v), css: { fill: "var(--accent)" } })));
  ramp.style.width = "60px";
  card.append(el("div", { class: "legend" }, el("span", null, "0 ", ramp, percent(high)), el("span", null, "blank: no data")), host);
  requestAnimationFrame(() => drawWide(host, (width) => drawHeat(host, width, spec, table, high)));
  return card;
}

const shade = (share) => 0.05 + 0.95 * share;

function drawHeat(host, width, spec, table, high) {
  const columns = table.steps.length, rows = table.cells[0].length;
  const w = (width - MARGIN.left - MARGIN.right) / columns, h = (HEIGHT - MARGIN.top - MARGIN.bottom) / rows;
  const root = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, "aria-hidden": "true" });
  const left = (c) => MARGIN.left + c * w, top = (r) => HEIGHT - MARGIN.bottom - (r + 1) * h;
  for (let c = 0; c < columns; c++) {
    for (let r = 0; r < rows; r++) {
      const value = table.cells[c][r];
      if (value === null) continue;
      root.append(svg("rect", { x: left(c), y: top(r), width: Math.max(0.5, w - (w > 4 ? 1 : 0)), height: h - 1, "fill-opacity": shade(value / high), "data-cell": `${c},${r}`, css: { fill: "var(--accent)" } }));
    }
  }
  for (const depth of [0, 0.25, 0.5, 0.75, 1]) root.append(svg("text", { x: MARGIN.left - 6, y: HEIGHT - MARGIN.bottom - depth * rows * h + 4, "text-anchor": "end" }, depth));
  const every = Math.max(1, Math.ceil(columns / Math.max(2, Math.floor(width / 70))));
  for (let c = 0; c < columns; c += every) root.append(svg("text", { x: left(c) + w / 2, y: HEIGHT - MARGIN.bottom + 15, "text-anchor": "middle" }, table.steps[c][0]));
  root.append(...axisNames(width, HEIGHT, "training steps", "depth r"));
  const frame = svg("rect", { fill: "none", "stroke-width": 2, width: w, height: h, visibility: "hidden", "pointer-events": "none", css: { stroke: "var(--ink)" } });
  root.append(frame);
  host.replaceChildren(root);
  let at = [0, 0];
  const show = (c, r, px, py) => {
    at = [c, r];
    const value = table.cells[c][r], [first, last] = table.steps[c];
    fill(frame, { x: left(c), y: top(r), visibility: "visible" }, []);
    tip.show(px, py, `${first === last ? `step ${first}` : `steps ${first} to ${last}`}, depth ${trim(r / 10)} to ${trim((r + 1) / 10)}\n`,
      el("b", null, value === null ? "no data" : percent(value)), value === null ? "" : ` ${spec.unit(table.counts[c][r])}`);
  };
  const hide = () => {
    frame.setAttribute("visibility", "hidden");
    tip.hide();
  };
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect(), scale = width / box.width;
    const c = Math.floor(((event.clientX - box.left) * scale - MARGIN.left) / w), r = Math.floor((HEIGHT - MARGIN.bottom - (event.clientY - box.top) * scale) / h);
    if (c >= 0 && c < columns && r >= 0 && r < rows) show(c, r, event.clientX, event.clientY);
    else hide();
  });
  root.addEventListener("pointerleave", hide);
  host.onblur = hide;
  host.onkeydown = (event) => {
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const c = Math.max(0, Math.min(columns - 1, at[0] + move[0])), r = Math.max(0, Math.min(rows - 1, at[1] + move[1]));
    const box = root.getBoundingClientRect();
    show(c, r, box.left + left(c) + w, box.top + top(r));
    tip.speak();
  };
}

function reliabilityChart(found) {
  const card = el("figure", { class: "card", "data-chart": "reliability" }, el("h3", null, "Calibration of P(success | r)"),
    el("p", null, "Each pivot is predicted by the fit of the previous step, which had not seen it. Points on the diagonal are calibrated. Bars: 95% intervals; area: number of pivots."));
  if (!found) {
    card.append(el("div", { class: "empty" }, "the saved trees have no pivot after a first fit"));
    return card;
  }
  const host = el("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `Predicted against observed success in ${found.bins.length} bins; mean distance ${percent(found.error)}. Arrow keys read out the bins.` });
  const better = found.brier < found.brier_constant;
  card.append(el("div", { class: "legend" }, el("span", null, `${plural(found.pivots, "pivot")}, mean distance from the diagonal ${percent(found.error)}`),
    el("span", null, `squared error ${number(found.brier)}, ${better ? "less" : "not less"} than the ${number(found.brier_constant)} of a constant prediction`)), host);
  requestAnimationFrame(() => drawWide(host, (width) => drawReliability(host, width, found)));
  return card;
}

function drawReliability(host, width, found) {
  const height = HEIGHT, side = width - MARGIN.left - MARGIN.right;
  const x = (v) => MARGIN.left + v * side, y = (v) => height - MARGIN.bottom - v * (height - MARGIN.top - MARGIN.bottom);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    root.append(svg("line", { class: "grid", x1: x(0), x2: x(1), y1: y(tick), y2: y(tick) }), svg("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, percent(tick)));
    root.append(svg("text", { x: x(tick), y: height - MARGIN.bottom + 16, "text-anchor": "middle" }, percent(tick)));
  }
  root.append(svg("line", { class: "cursor", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }));
  root.append(...axisNames(width, height, "predicted by the fit", "observed"));
  const most = Math.max(...found.bins.map((bin) => bin.pivots));
  const dots = found.bins.map((bin) => {
    const dot = svg("circle", { cx: x(bin.predicted), cy: y(bin.observed), r: 3 + 7 * Math.sqrt(bin.pivots / most), "fill-opacity": 0.75, css: { fill: "var(--accent)" } });
    root.append(svg("line", { x1: x(bin.predicted), x2: x(bin.predicted), y1: y(bin.low), y2: y(bin.high), "stroke-width": 1.5, css: { stroke: "var(--accent)" } }), dot);
    return dot;
  });
  host.replaceChildren(root);
  const show = (i, px, py) => {
    const bin = found.bins[i];
    tip.show(px, py, `predicted `, el("b", null, percent(bin.predicted)), `, observed `, el("b", null, percent(bin.observed)), `\n${percent(bin.low)} to ${percent(bin.high)}, ${plural(bin.pivots, "pivot")}`);
  };
  let at = -1;
  dots.forEach((dot, i) => dot.addEventListener("pointermove", (event) => show(i, event.clientX, event.clientY)));
  root.addEventListener("pointerleave", tip.hide);
  host.onblur = tip.hide;
  host.onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.max(0, Math.min(dots.length - 1, at + move));
    const box = dots[at].getBoundingClientRect();
    show(at, box.right, box.top);
    tip.speak();
  };
}
