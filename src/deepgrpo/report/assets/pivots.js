// ---- pivot figures of a run

function drawPivots(run) {
  const host = byId("pivot-charts");
  forget(host);
  const { q, rescue, reliability, steps } = run.pivots;
  const gamma = run.gamma === null || run.gamma === undefined ? "" : `, γ = ${run.gamma}`;
  const cards = [
    heatmap({
      title: "Q(r): where pivots are drawn", full: false, unit: (n) => `of Q, ${plural(n, "rollout")}`,
      about: `Mean mass of Q by depth of the state, over expanded rollouts${gamma}; for a rollout of m segments, r = 1 / (m + 1) is the prompt and r = 1 the end. From ${plural(steps, "saved step")}.`,
      none: steps ? "no pivot was drawn from a distribution over states" : "this run has no saved trees (log.trees_every)",
    }, q),
    heatmap({
      title: "Rescue rate by depth", full: true, unit: (n) => `of ${plural(n, "pivot")}`,
      about: "Share of pivots with a branch that succeeds and beats their rollout, at every step.", none: "this run has no pivots",
    }, rescue),
  ];
  if (run.curves["recoverability/w"]) cards.push(reliabilityChart(reliability));
  if (run.curves["recoverability/w"]) {
    cards.push(lineChart({
      title: "The fit P(success | r) = σ(w·r + b)", about: "A function of the depth ratio r only, refitted after each step. w below 0: deeper is harder.", unit: "coefficient", format: number, xLabel: "training steps", xFormat: count,
      lines: ["w", "b"].map((key, i) => ({ name: key, colour: colourOf(i), dash: "", points: pointsOf(run, `recoverability/${key}`, null, "step") })),
    }));
  }
  host.replaceChildren(...cards);
}
