"""Evaluation during training: measure the policy on the held-out prompts and write the answers."""

from __future__ import annotations

import time
from dataclasses import replace

from deepgrpo.engines.base import named
from deepgrpo.eval.evaluate import evaluate
from deepgrpo.ledger import Ledger
from deepgrpo.progress import phase
from deepgrpo.runs.checkpoints import TrainState
from deepgrpo.runs.files import replacing
from deepgrpo.runs.text import json_text
from deepgrpo.train.metrics import Metrics
from deepgrpo.train.setup import Run


def evaluate_run(run: Run, state: TrainState) -> tuple[TrainState, Metrics]:
    """Evaluate the policy and write `eval/step-*.jsonl`; the state remembers the first, last and best greedy accuracy."""
    began = time.perf_counter()
    run.parts.begin_step()
    config = run.config
    responses = len(run.eval_prompts) * (1 + config.eval.samples)
    with named(f"evaluation after step {state.step}"), phase("evaluation", responses) as advance:
        result = evaluate(
            run.engine, run.eval_reward, run.eval_prompts, run.policy.tokenizer,
            # with the model's context filled in
            sampling=config.sampling.model_copy(update={"max_total_tokens": run.limits.max_total_tokens}),
            samples=config.eval.samples, k=config.eval.k, seed=config.run.seed,
            truncated_value=(config.eval.reward or config.reward).truncated_value,
            success_threshold=config.explore.success_threshold, episodes=run.episodes, progress=advance,
        )  # fmt: skip
    path = run.paths.eval(state.step)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(json_text(row.as_dict()) + "\n" for row in result.rows)
    seconds = time.perf_counter() - began
    greedy = result.metrics["eval/greedy"]
    # step 0 is never the best: it need not have a checkpoint
    if state.step and (state.best_value is None or greedy > state.best_value):
        state = replace(state, best_step=state.step, best_value=greedy)
    state = replace(
        state, ledger=state.ledger + Ledger(seconds_eval=seconds), last_value=greedy, last_step=state.step,
        first_value=greedy if state.first_value is None else state.first_value,
    )  # fmt: skip
    return state, {**result.metrics, "time/eval": seconds}
