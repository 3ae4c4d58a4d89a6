// ---- one tree: rollouts as lanes, pivots with Q along the chain, branches below, all texts

const LANE = { q: 34, bar: 14, branch: 9, gap: 4, left: 20, right: 40, ruler: 18 };
const LONG = 2500;

// Tokens of a node that an environment gave, and the reply that one of them is in.
const given = (node) => (node.g || []).reduce((sum, [start, end]) => sum + end - start, 0);
const replyAt = (node, t) => (node.g || []).find(([start, end]) => start <= t && t < end);

class TreeView {
  constructor(host) {
    this.host = host;
    host.addEventListener("pointerover", (event) => this.hover(event));
    host.addEventListener("pointerout", () => tip.hide());
    host.addEventListener("click", (event) => this.click(event));
    host.addEventListener("keydown", (event) => this.key(event));
  }

  say(text) {
    forget(this.host);
    this.host.replaceChildren(el("p", { class: "empty" }, text));
  }

  show(tree, run, query, turn) {
    forget(this.host);
    this.tree = tree;
    this.run = run;
    this.query = query;
    this.children = tree.pivots.map((_, p) => tree.nodes.flatMap((node, i) => (node.v === p ? [i] : [])));
    this.pivotsIn = new Map();
    tree.pivots.forEach((pivot, p) => this.pivotsIn.set(pivot.p, [...(this.pivotsIn.get(pivot.p) || []), p]));
    // deepest first, so that no branch crosses the line of another
    for (const pivots of this.pivotsIn.values()) pivots.sort((a, b) => tree.pivots[b].o - tree.pivots[a].o);
    this.start = [];
    tree.nodes.forEach((node, i) => (this.start[i] = node.p < 0 ? 0 : this.start[node.p] + node.o));
    this.longest = Math.max(1, ...tree.nodes.map((node, i) => this.start[i] + node.n));
    this.most = Math.max(1e-9, ...tree.nodes.flatMap((node) => node.a.map((span) => Math.abs(span[2]))));
    this.light = tree.nodes.reduce((sum, node) => sum + node.n, 0) < 6000;
    const roots = tree.nodes.flatMap((node, i) => (node.p < 0 ? [i] : []));
    this.host.replaceChildren(...this.head(turn), ...this.ask(), ...roots.map((i, n) => this.lane(i, n)));
  }

  head(turn) {
    const { tree } = this;
    const real = tree.pivots.map((pivot, p) => p).filter((p) => tree.pivots[p].s === "branch");
    const rescued = real.filter((p) => this.rescued(p)).length, chances = real.filter((p) => this.rescued(p) || this.goal(p) <= this.run.threshold).length;
    const main = tree.nodes.filter((node) => node.s === "main" && node.f !== "segment");
    return [
      el("div", { class: "head" }, el("h3", null, "Prompt ", visible(tree.id), ` at step ${tree.step}`),
        el("span", { class: "turn" },
          el("button", { type: "button", disabled: !turn.back, on: { click: turn.back || (() => {}) } }, "← previous"),
          el("button", { type: "button", disabled: !turn.on, on: { click: turn.on || (() => {}) } }, "next →"))),
      el("p", { class: "facts" }, `${main.filter((node) => this.good(node)).length} of ${plural(main.length, "rollout")} succeed`,
        real.length ? `, ${rescued} of ${plural(chances, "pivot")} ${chances < real.length ? "in failed rollouts " : ""}rescued` : "", `, ${plural(tree.nodes.reduce((s, n) => s + (n.s === "given" ? 0 : n.n - given(n)), 0), "sampled token")}. `,
        el("span", { class: "scale" }, "token advantage ", signed(-this.most), el("i", { "aria-hidden": "true" }), signed(this.most))),
      el("p", { class: "key" }, this.legend(real.length, tree.pivots.some((pivot) => pivot.q.length > 1)).map(([mark, words]) => el("span", null, el("i", { class: mark, "aria-hidden": "true" }, mark === "pivot" ? "◆" : ""), words))),
    ];
  }

  legend(pivots, chain) {
    const found = [["full", "success"], ["hollow", "failure"]];
    if (this.tree.nodes.some((node) => node.e.length)) found.push(["cuts", "end of a segment"]);
    if (this.tree.nodes.some((node) => node.f === "segment" && node.s !== "given")) found.push(["grey", "segment, continued below"]);
    if (this.tree.nodes.some((node) => node.g)) found.push(["reply", "reply of the environment, not trained"]);
    if (this.tree.nodes.some((node) => node.s === "given")) found.push(["grey", "text of an earlier step, continued below"]);
    if (this.pivotsIn.size > (this.pivotsIn.has(-1) ? 1 : 0)) found.push(["pivot", pivots ? "pivot, its branches below" : "continued here"]);
    if (chain) found.push(["bars", "Q of each candidate state"]);
    return found;
  }

  ask() {
    const { tree } = this;
    const rows = [["question", tree.question], ["answer", tree.answer], ["as the model reads it", tree.prompt]].filter(([, text]) => text !== null && text !== undefined);
    return [el("dl", { class: "ask" }, rows.map(([name, text]) => [el("dt", null, name), el("dd", null, this.marked(text))]))];
  }

  // Number that says success: the reward, or that of the part that is chosen for it.
  outcome(node) {
    return node.u ?? node.r;
  }

  good(node) {
    return this.outcome(node) > this.run.threshold;
  }

  // Reward and its parts, if it has several.
  rewardWords(node) {
    const parts = Object.entries(node.t ?? {}).map(([name, value]) => `${name} ${number(value)}`);
    return parts.length ? `${number(node.r)} (${parts.join(", ")})` : number(node.r);
  }

  // Outcome that a branch has to exceed for a rescue: the threshold, or that of the rollout it left if that succeeded.
  goal(p) {
    const parent = this.tree.nodes[this.tree.pivots[p].p];
    return parent && parent.f !== "segment" ? Math.max(this.run.threshold, this.outcome(parent)) : this.run.threshold;
  }

  rescued(p) {
    return this.children[p].some((i) => this.outcome(this.tree.nodes[i]) > this.goal(p));
  }

  colour(node) {
    return node.f === "segment" ? "var(--soft)" : this.good(node) ? "var(--good)" : "var(--bad)";
  }

  reward(node) {
    if (node.f === "segment") return el("span", { class: "mark" }, node.s === "given" ? "given" : "segment");
    return el("span", { class: `mark ${this.good(node) ? "good" : "bad"}` }, `${this.good(node) ? "✓" : "✗"} ${this.rewardWords(node)}`);
  }

  advantage(node) {
    if (!node.a.length) return "not trained";
    const values = [...new Set(node.a.map((span) => span[2]))];
    return values.length === 1 ? `advantage ${signed(values[0])}` : `advantages ${values.map(signed).join(", ")}`;
  }

  facts(node) {
    const notes = [this.advantage(node), plural(node.n, "token") + (given(node) ? `, ${given(node)} given` : "")];
    if (node.f === "length") notes.push("cut off at the length limit");
    if (node.w) notes.push(node.w);
    return notes.join(" · ");
  }

  // ---- a lane

  lane(i, n) {
    const node = this.tree.nodes[i];
    const picture = el("div", { class: "picture" });
    requestAnimationFrame(() => drawWide(picture, (width) => picture.replaceChildren(this.picture(i, width))));
    const name = node.s === "given" ? "Earlier rollout" : `Rollout ${n + 1}`;
    return el("section", { class: "lane", "data-root": i, "aria-label": name.toLowerCase() },
      el("h4", null, `${name} `, this.reward(node), el("small", null, this.facts(node))), picture, this.text(i), this.turns(i), this.below(i));
  }

  // All descendants of a node, depth first.
  descendants(i, found = []) {
    for (const p of this.pivotsIn.get(i) || []) {
      for (const child of this.children[p]) {
        found.push(child);
        this.descendants(child, found);
      }
    }
    return found;
  }

  picture(i, width) {
    const { tree } = this, node = tree.nodes[i];
    const x = (token) => LANE.left + ((width - LANE.left - LANE.right) * token) / this.longest;
    const pivots = this.pivotsIn.get(i) || [];
    const chain = pivots.map((p) => tree.pivots[p]).find((pivot) => pivot.q.length > 1);
    const top = chain ? LANE.q : 2;
    const under = this.descendants(i);
    const bottom = top + LANE.bar + (under.length ? 6 + under.length * (LANE.branch + LANE.gap) : 0), height = bottom + LANE.ruler;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `rollout with ${plural(node.n, "token")}, ${plural(pivots.length, "pivot")}, ${plural(under.length, "branch", "branches")}` });
    const row = new Map([[i, top]]);
    under.forEach((child, k) => row.set(child, top + LANE.bar + 6 + k * (LANE.branch + LANE.gap)));
    for (const each of [i, ...under]) {
      const h = each === i ? LANE.bar : LANE.branch;
      for (const p of this.pivotsIn.get(each) || []) {
        const kids = this.children[p], from = x(this.start[each] + tree.pivots[p].o);
        if (kids.length) root.append(svg("path", { d: `M${from},${row.get(each) + h}V${row.get(kids[kids.length - 1]) + LANE.branch}`, fill: "none", "stroke-width": 1.5, css: { stroke: "var(--pivot)" } }));
      }
      root.append(this.bar(each, x, row.get(each), h));
    }
    if (chain) root.append(...this.chain(chain, pivots, x, top));
    root.append(...this.ruler(x, bottom, width));
    for (const p of pivots) {
      const at = x(tree.pivots[p].o);
      root.append(svg("path", { d: `M${at - 6},${top - 1}h12l-6,${LANE.bar + 4}z`, "data-pivot": p, css: { fill: "var(--pivot)" } }));
    }
    return root;
  }

  // Token scale under a lane.
  ruler(x, y, width) {
    const marks = ticks(0, this.longest, Math.min(10, width / 80)).filter((token) => x(token) < width - 52).map((token) => [
      svg("line", { class: "axis", x1: x(token), x2: x(token), y1: y + 2, y2: y + 5 }),
      svg("text", { x: x(token), y: y + LANE.ruler - 2, "text-anchor": "middle" }, count(token)),
    ]);
    return [...marks.flat(), svg("text", { x: width, y: y + LANE.ruler - 2, "text-anchor": "end" }, "tokens")];
  }

  bar(i, x, y, h) {
    const node = this.tree.nodes[i], from = x(this.start[i]), to = x(this.start[i] + node.n);
    const solid = this.good(node) || node.f === "segment";
    const group = svg("g", { "data-node": i });
    group.append(svg("rect", { x: from, y, width: Math.max(2, to - from), height: h, rx: 2, "stroke-width": 1.5, "fill-opacity": solid ? 0.85 : 0.16, css: { fill: this.colour(node), stroke: this.colour(node) } }));
    for (const end of node.e) group.append(svg("line", { x1: x(this.start[i] + end), x2: x(this.start[i] + end), y1: y, y2: y + h, "stroke-width": 2, css: { stroke: "var(--panel)" } }));
    if (node.f !== "segment") group.append(svg("text", { x: to + 4, y: y + h / 2 + 3.5, css: { fill: this.colour(node), "font-size": "10px" } }, `${number(node.r)}${node.f === "length" ? " …" : ""}`));
    return group;
  }

  chain(chain, pivots, x, top) {
    const most = Math.max(...chain.q), chosen = new Set(pivots.map((p) => this.tree.pivots[p].o));
    const name = svg("text", { x: 0, y: top - 4, css: { fill: "var(--pivot)" } }, "Q");
    return [name, ...chain.c.map((offset, k) => {
      const h = Math.max(1.5, ((top - 16) * chain.q[k]) / most);
      return svg("g", { "data-q": k, "data-of": pivots.find((p) => this.tree.pivots[p] === chain) },
        svg("rect", { x: x(offset) - 6, y: 0, width: 12, height: top, "fill-opacity": 0 }),
        svg("rect", { x: x(offset) - 3.5, y: top - 3 - h, width: 7, height: h, rx: 1, "fill-opacity": chosen.has(offset) ? 1 : 0.45, css: { fill: "var(--pivot)" } }),
        chosen.has(offset) ? svg("text", { x: x(offset), y: top - 6 - h, "text-anchor": "middle", css: { fill: "var(--pivot)", "font-size": "10px" } }, trim(chain.q[k])) : "");
    })];
  }

  // Replies of an environment: calls, reward and observation of each turn.
  turns(i) {
    const { g } = this.tree.nodes[i];
    if (!g) return "";
    return el("ol", { class: "turns" }, g.map(([start, end, observation, reward, calls, failed]) => el("li", null,
      [calls ? plural(calls, "call") + (failed ? `, ${failed} failed` : "") : "no call", reward === null ? "" : `reward ${number(reward)}`].filter(Boolean).join(" · "),
      observation ? el("code", { class: end > start ? "" : "soft" }, visible(observation)) : "", observation && end === start ? " (not shown)" : "")));
  }

  // ---- texts

  text(i) {
    const node = this.tree.nodes[i];
    const box = el("div", { class: `text${ownText(node).length > LONG ? " long" : ""}`, "data-text": i });
    if (!node.k) {
      box.append(this.before(i), ...this.marked(node.x));
      return box;
    }
    fill(box, { tabindex: "0", role: "group", "aria-label": `text of ${plural(node.n, "token")}; arrow keys move through them` }, []);
    const marks = new Map();
    for (const p of this.pivotsIn.get(i) || []) marks.set(this.tree.pivots[p].o, p);
    const ends = new Set(node.e), hits = this.hits(node);
    box.append(this.before(i));
    node.k.forEach((piece, t) => {
      box.append(this.cut(marks.get(t), ends.has(t)));
      const special = this.run.trees.specials.includes(piece);
      const span = el("span", { class: `t${special ? " sp" : ""}${replyAt(node, t) ? " gv" : ""}`, "data-t": t, css: { background: this.tint(node, t) } }, special ? piece : visible(piece));
      box.append(hits.has(t) ? el("mark", null, span) : span);
    });
    box.append(this.cut(marks.get(node.n), false));
    return box;
  }

  cut(pivot, end) {
    if (pivot !== undefined) return el("span", { class: "cut pv", "data-pivot": pivot }, "◆");
    return end ? el("span", { class: "cut", "aria-hidden": "true" }, "│") : "";
  }

  // The last characters before a branch, for context.
  before(i) {
    const node = this.tree.nodes[i];
    if (node.p < 0 || !node.k) return "";
    let text = "", at = i;
    while (this.tree.nodes[at].p >= 0 && text.length < 28) {
      const parent = this.tree.nodes[this.tree.nodes[at].p];
      text = parent.k.slice(0, this.tree.nodes[at].o).join("") + text;
      at = this.tree.nodes[at].p;
    }
    return el("span", { class: "before" }, text.length > 28 ? "…" : "", visible(text.slice(-28).replaceAll("\n", " ")), "◆");
  }

  span(node, t) {
    return node.a.filter(([start, end]) => start <= t && t < end);
  }

  tint(node, t) {
    if (replyAt(node, t)) return "transparent";
    const sum = this.span(node, t).reduce((total, span) => total + span[2], 0);
    const share = Math.min(1, Math.abs(sum) / this.most);
    return sum === 0 ? "transparent" : `rgb(var(--${sum > 0 ? "good" : "bad"}-rgb) / ${(0.08 + 0.4 * share).toFixed(3)})`;
  }

  // Tokens that contain the search text.
  hits(node) {
    const found = new Set();
    if (!this.query) return found;
    const text = ownText(node).toLowerCase();
    const places = [];
    for (let at = text.indexOf(this.query); at >= 0; at = text.indexOf(this.query, at + 1)) places.push(at);
    if (!places.length) return found;
    let from = 0;
    node.k.forEach((piece, t) => {
      const to = from + piece.length;
      if (places.some((at) => at < to && from < at + this.query.length)) found.add(t);
      from = to;
    });
    return found;
  }

  marked(text) {
    const parts = [];
    let rest = text;
    for (let at; this.query && (at = rest.toLowerCase().indexOf(this.query)) >= 0; rest = rest.slice(at + this.query.length)) {
      parts.push(...visible(rest.slice(0, at)), el("mark", null, visible(rest.slice(at, at + this.query.length))));
    }
    return [...parts, ...visible(rest)];
  }

  // ---- branches

  below(i) {
    return (this.pivotsIn.get(i) || []).map((p) => {
      const kids = this.children[p], details = el("details", { "data-of": p, open: this.light });
      const body = el("ul", { class: "branches" }), { z } = this.tree.pivots[p];
      const draw = () => {
        if (!body.childElementCount) body.append(...kids.map((k) => this.branch(k)));
      };
      details.append(el("summary", null, this.pivotWords(p)), z ? el("details", { class: "state" }, el("summary", null, "state of the environment"), el("code", null, visible(z))) : "", body);
      details.addEventListener("toggle", () => details.open && draw());
      if (this.light) draw();
      return details;
    });
  }

  pivotWords(p) {
    const pivot = this.tree.pivots[p], kids = this.children[p];
    const goal = this.goal(p), better = kids.filter((i) => this.outcome(this.tree.nodes[i]) > goal).length;
    const tries = `not recovered in ${plural(kids.length, "try", "tries")}`;
    const [word, look] = better ? ["rescued", "good"] : goal > this.run.threshold ? ["nothing to rescue", "soft"] : [tries, "bad"];
    const q = pivot.q[pivot.c.indexOf(pivot.o)];
    const where = `after token ${pivot.o}` + (pivot.r ? `, r = ${number(pivot.r)}` : "") + (q === undefined ? "" : `, Q = ${number(q)}`);
    if (pivot.s !== "branch") return [el("b", { class: "pivot" }, "◆ "), `${plural(kids.length, "continuation")} ${where}`];
    return [el("b", { class: "pivot" }, "◆ pivot "), `${where}: `, look === "bad" ? "" : `${better} of ${plural(kids.length, "branch", "branches")} better — `, el("b", { class: look }, word)];
  }

  branch(i) {
    const node = this.tree.nodes[i];
    return el("li", { "data-branch": i }, el("div", null, this.reward(node), " ", el("small", null, node.a.length ? signed(node.a[0][2]) : "not trained")),
      el("div", null, this.text(i), this.turns(i), node.f === "length" || node.w ? el("small", null, this.facts(node)) : "", this.below(i)));
  }

  // ---- pointer and keys

  hover(event) {
    const { tree } = this, x = event.clientX, y = event.clientY;
    const token = event.target.closest("[data-t]");
    if (token) return this.tokenTip(token, x, y);
    const cut = event.target.closest("[data-pivot]");
    if (cut) return tip.show(x, y, this.pivotWords(Number(cut.dataset.pivot)).map((part) => part.textContent ?? part));
    const q = event.target.closest("[data-q]");
    if (q) {
      const pivot = tree.pivots[Number(q.dataset.of)], k = Number(q.dataset.q);
      const first = pivot.c[0] === 0 ? 0 : 1, length = Math.max(1, Math.round((pivot.c.indexOf(pivot.o) + first + 1) / pivot.r));
      return tip.show(x, y, `state ${k + 1} of ${pivot.c.length}: ${pivot.c[k] ? `after token ${pivot.c[k]}` : "the prompt"}\nr = ${number((k + first + 1) / length)}, Q = ${number(pivot.q[k])}${pivot.c[k] === pivot.o ? ", drawn" : ""}`);
    }
    const bar = event.target.closest("[data-node]");
    if (bar) {
      const node = tree.nodes[Number(bar.dataset.node)];
      tip.show(x, y, `${node.p < 0 ? "rollout" : "branch"}: ${node.f === "segment" ? "segment" : `reward ${this.rewardWords(node)}`}\n${this.facts(node)}`);
    }
  }

  tokenTip(token, x, y) {
    const i = Number(token.closest("[data-text]").dataset.text), t = Number(token.dataset.t), node = this.tree.nodes[i];
    const spans = this.span(node, t);
    if (replyAt(node, t)) return tip.show(x, y, `token ${this.start[i] + t + 1}  `, el("b", null, visible(node.k[t])), "\ngiven by the environment, not trained");
    tip.show(x, y, `token ${this.start[i] + t + 1}  `, el("b", null, node.k[t] ? visible(node.k[t]) : "(part of the previous character)"),
      `\n${spans.length ? spans.map((span) => `advantage ${signed(span[2])} in the ${span[3]} stream`).join("\n") : "not trained"}`,
      `\nprobability ${percent(Math.exp(node.l[t] / 100))} (${trim(-node.l[t] / 100)} nats)`);
  }

  click(event) {
    const bar = event.target.closest("[data-node]");
    if (!bar) return;
    const i = Number(bar.dataset.node);
    for (let at = i; this.tree.nodes[at].p >= 0; at = this.tree.nodes[at].p) {
      const details = this.host.querySelector(`details[data-of="${this.tree.nodes[at].v}"]`);
      if (details && !details.open) details.open = true;
    }
    setTimeout(() => {
      const row = this.host.querySelector(`[data-branch="${i}"]`) || this.host.querySelector(`[data-text="${i}"]`);
      if (!row) return;
      this.host.querySelectorAll(".flash").forEach((each) => each.classList.remove("flash"));
      row.classList.add("flash");
      row.scrollIntoView({ block: "nearest" });
    });
  }

  key(event) {
    const box = event.target.closest("[data-text]"), move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!box || !move) return;
    event.preventDefault();
    const tokens = [...box.querySelectorAll("[data-t]")], now = tokens.findIndex((token) => token.classList.contains("at"));
    if (now >= 0) tokens[now].classList.remove("at");
    const token = tokens[Math.max(0, Math.min(tokens.length - 1, now + move))];
    token.classList.add("at");
    token.scrollIntoView({ block: "nearest" });
    const place = token.getBoundingClientRect();
    this.tokenTip(token, place.left, place.bottom);
    tip.speak();
  }
}
