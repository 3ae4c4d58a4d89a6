// ---- page

const state = { runs: DATA.runs, axis: "tokens", smooth: 1, hidden: new Set() };

function overview() {
  const last = (run, key) => (run.curves[key] || []).filter((v) => v !== null);
  const ends = (run, key) => {
    const values = last(run, key);
    return values.length > 1 ? `${percent(values[0])} → ${percent(values[values.length - 1])}` : values.length ? percent(values[0]) : "–";
  };
  const columns = [
    ["run", (run, r) => [el("span", { class: "swatch", css: { background: colourOf(r) } }), run.name]],
    ["strategy", (run) => run.strategy],
    ["seed", (run) => String(run.seed ?? "–")],
    ["steps", (run) => `${run.axes.step[run.axes.step.length - 1]}${run.planned ? ` of ${run.planned}` : ""}`],
    ["sampled tokens", (run) => count(run.ledger.sampled_tokens ?? 0)],
    ["optimizer steps", (run) => count(run.ledger.optimizer_steps ?? 0)],
    ["training", (run) => time(run.axes.seconds[run.axes.seconds.length - 1])],
    ["greedy accuracy, first → last", (run) => ends(run, "eval/greedy")],
    ["saved trees", (run) => run.trees.saved.toLocaleString("en")],
    ["warnings", (run) => (run.warnings.length ? el("b", { class: "bad" }, String(run.warnings.length)) : "0")],
  ];
  byId("runs").append(el("thead", null, el("tr", null, columns.map(([name]) => el("th", { scope: "col" }, name)))),
    el("tbody", null, state.runs.map((run, r) => el("tr", null, columns.map(([name, cell]) => el("td", { "data-name": name }, el("span", null, cell(run, r))))))));
  byId("warnings").append(...state.runs.flatMap((run) => run.warnings.map((each) =>
    el("p", { class: "warning" }, el("b", null, `${state.runs.length > 1 ? `${run.name}, ` : ""}step ${each.step}: `), visible(each.text)))));
  byId("notes").append(...state.runs.flatMap((run) => run.notes.map((text) => el("p", { class: "note" }, visible(text)))));
}

function recipes() {
  const label = (key) => key.replaceAll("_", " ");
  byId("recipes").append(...state.runs.map((run) =>
    el("details", { open: state.runs.length === 1 }, el("summary", null, el("b", null, run.name), ` — ${run.path}`),
      el("div", { class: "two" }, el("pre", { tabindex: "0", "aria-label": "recipe" }, run.recipe),
        el("table", null, el("thead", null, el("tr", null, el("th", { scope: "col" }, "spent so far"), el("th", { scope: "col" }, ""))),
          el("tbody", null, Object.entries(run.ledger).map(([key, value]) => el("tr", null, el("td", null, label(key)), el("td", null, key.startsWith("seconds") ? time(value) : value.toLocaleString("en"))))))))));
}

// ---- the explorer

const search = { run: 0, open: null, step: null, flags: new Set(), query: "", deep: false, ticket: 0 };
const view = new TreeView(byId("tree"));
const list = new TreeList(byId("list"), (i, at, quiet) => openTree(i, at, quiet));

async function openTree(i, at, quiet) {
  const ticket = (search.opening = (search.opening || 0) + 1);
  search.open = i;
  try {
    const index = await openIndex(search.run);
    const trees = await openBlock(search.run, index.block[i]);
    if (ticket !== search.opening) return;
    const turn = { back: at > 0 ? () => list.choose(at - 1) : null, on: at + 1 < list.found.length ? () => list.choose(at + 1) : null };
    view.show(trees[index.place[i]], state.runs[search.run], search.query.toLowerCase(), turn);
    if (!quiet) history.replaceState(null, "", `#tree=${search.run}/${index.step[i]}/${index.number[i]}`);
  } catch (error) {
    view.say(`This tree cannot be opened: ${error.message}`);
  }
}

// Refresh the list; keep the open tree if it is still listed.
async function refresh(wanted = search.open) {
  const ticket = ++search.ticket, run = search.run, { trees } = state.runs[run];
  const say = (text) => (byId("found").textContent = text);
  try {
    const index = await openIndex(run);
    if (index === null) {
      list.show(null, []);
      say("");
      view.say(trees.saved ? "The trees of this run were left out of the page (--max-trees)." : "This run has no saved trees; log.trees_every sets how often they are saved.");
      return;
    }
    const started = performance.now();
    const found = await findTrees(run, index, { step: search.step, flags: [...search.flags], query: search.query, deep: search.deep }, (block) => {
      if (performance.now() - started > 200) say(`reading responses: ${percent(block / trees.blocks)}`);
      return ticket === search.ticket;
    });
    if (found === null || ticket !== search.ticket) return;
    list.show(index, found);
    say(`${found.length.toLocaleString("en")} of ${plural(index.id.length, "tree")}${trees.shown < trees.saved ? ` (${trees.saved.toLocaleString("en")} saved)` : ""}`);
    const place = found.indexOf(wanted);
    countFlags(index, found);
    if (found.length) list.choose(Math.max(0, place), true, true);
    else view.say("No tree matches. Remove a filter, or search in responses too.");
  } catch (error) {
    view.say(error.message);
  }
}

// Number of listed trees that each filter would leave.
function countFlags(index, found) {
  FLAGS.forEach((flag, bit) => {
    const many = found.reduce((sum, i) => sum + ((index.flags[i] >> bit) & 1), 0);
    document.querySelector(`[data-flag=${flag}] small`).textContent = many.toLocaleString("en");
  });
}

async function showRun(run, wanted) {
  search.run = run;
  search.open = null;
  byId("tree-run").value = byId("pivot-run").value = String(run);
  const index = await openIndex(run).catch(() => null);
  const steps = index ? [...new Set(index.step)] : [];
  const per = new Map();
  if (index) for (const step of index.step) per.set(step, (per.get(step) || 0) + 1);
  search.step = null;
  choose(byId("step"), [["", "all steps"], ...steps.map((step) => [step, `${step}  (${plural(per.get(step), "tree")})`])], "");
  drawPivots(state.runs[run]);
  const found = wanted && index ? index.step.findIndex((step, i) => step === wanted.step && index.number[i] === wanted.number) : -1;
  await refresh(found < 0 ? undefined : found);
}

function initExplorer() {
  const runs = state.runs.map((run, r) => [String(r), run.name]);
  for (const id of ["tree-run", "pivot-run"]) {
    choose(byId(id), runs, "0");
    byId(id).addEventListener("change", (event) => showRun(Number(event.target.value)));
  }
  if (runs.length === 1) document.querySelectorAll(".run-of").forEach((label) => (label.hidden = true));
  byId("flags").append(...FLAGS.map((flag) =>
    el("button", { type: "button", "aria-pressed": "false", title: FLAG_WORDS[flag], "data-flag": flag, on: { click: (event) => {
      const on = !search.flags.has(flag);
      if (on) search.flags.add(flag);
      else search.flags.delete(flag);
      event.currentTarget.setAttribute("aria-pressed", String(on));
      refresh();
    } } }, `${FLAG_NAMES[flag] ?? flag} `, el("small"))));
  byId("step").addEventListener("change", (event) => {
    search.step = event.target.value === "" ? null : Number(event.target.value);
    refresh();
  });
  let waiting = 0;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      search.query = event.target.value.trim();
      refresh();
    }, 150);
  });
  byId("deep-search").addEventListener("change", (event) => {
    search.deep = event.target.checked;
    refresh();
  });
  const linked = /^#tree=(\d+)\/(\d+)\/(\d+)$/.exec(location.hash);
  const run = linked && Number(linked[1]) < state.runs.length ? Number(linked[1]) : 0;
  showRun(run, linked ? { step: Number(linked[2]), number: Number(linked[3]) } : undefined).then(() => {
    if (linked) byId("trees").scrollIntoView();
    document.documentElement.dataset.ready = "yes";
  });
}

overview();
initCurves(state);
recipes();
initExplorer();
byId("foot").textContent = `deepgrpo ${DATA.version}. How to read this page: docs/report.md. This page is self-contained and makes no network requests.`;
