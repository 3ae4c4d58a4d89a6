// ---- the list of trees; only visible rows exist in the document

const ROW = 70;

class TreeList {
  constructor(host, onChoose) {
    this.host = host;
    this.onChoose = onChoose;
    this.found = [];
    this.chosen = -1;
    this.spacer = el("div", { class: "spacer" });
    host.append(this.spacer);
    host.addEventListener("scroll", () => this.draw());
    host.addEventListener("keydown", (event) => this.key(event));
    host.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.choose(Number(row.dataset.at));
    });
    new ResizeObserver(() => this.draw()).observe(host);
  }

  show(index, found) {
    this.index = index;
    this.found = found;
    this.chosen = -1;
    this.spacer.style.height = `${found.length * ROW}px`;
    this.host.scrollTop = 0;
    this.draw();
  }

  // Select the row `at` and show its tree. `middle`: scroll it to the middle.
  choose(at, quiet, middle) {
    if (at < 0 || at >= this.found.length) return;
    this.chosen = at;
    const top = at * ROW, { scrollTop, clientHeight } = this.host;
    if (middle) this.host.scrollTop = top - (clientHeight - ROW) / 2;
    else if (top < scrollTop) this.host.scrollTop = top;
    else if (top + ROW > scrollTop + clientHeight) this.host.scrollTop = top + ROW - clientHeight;
    this.draw();
    this.onChoose(this.found[at], at, quiet);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.host.clientHeight / ROW) - 1);
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (!move) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(this.found.length - 1, this.chosen + move)));
  }

  draw() {
    const first = Math.max(0, Math.floor(this.host.scrollTop / ROW) - 3);
    const last = Math.min(this.found.length, first + Math.ceil(this.host.clientHeight / ROW) + 6);
    const rows = [];
    for (let at = first; at < last; at++) rows.push(this.row(at));
    this.host.replaceChildren(this.spacer, ...rows);
    if (this.chosen >= first && this.chosen < last) this.host.setAttribute("aria-activedescendant", `row-${this.chosen}`);
    else this.host.removeAttribute("aria-activedescendant");
  }

  row(at) {
    const i = this.found[at], index = this.index;
    const right = index.successes[i], all = index.rollouts[i];
    // one dot per rollout, if there are few
    const score = all <= 16 ? el("span", { class: "dots", "aria-hidden": "true" }, el("span", { class: "good" }, "●".repeat(right)), el("span", { class: "bad" }, "○".repeat(all - right))) : null;
    const words = `${right}/${all} right` + (index.chances[i] ? `, ${index.rescued[i]}/${index.chances[i]} rescued` : "") + (index.flags[i] & 4 ? ", truncated" : "");
    return el("div", { class: "row", role: "option", id: `row-${at}`, "data-at": at, "aria-selected": String(at === this.chosen), "aria-setsize": this.found.length, "aria-posinset": at + 1, css: { top: `${at * ROW}px` } },
      el("div", { class: "id" }, el("span", null, `step ${index.step[i]} · `, visible(index.id[i])), score),
      el("div", { class: "q" }, visible(index.question[i].replaceAll("\n", " "))),
      el("div", { class: "id" }, el("span", null, words)));
  }
}
