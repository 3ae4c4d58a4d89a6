"""Final evaluation: measure a finished run on untouched questions. Runs as a separate process:

    python -m deepgrpo.lab.compare.final_eval RUN_DIR SPEC.json     (SPEC: a `FinalConfig`) writes RUN_DIR/final.json

All runs of a seed answer the same questions with the same random numbers, which reduces the noise of differences.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepgrpo.config import Config, DataConfig, GeneratedData, parse_section
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.lab.compare.experiment import FinalConfig
from deepgrpo.processes import follow_parent
from deepgrpo.prompts import synthetic
from deepgrpo.records import Prompt
from deepgrpo.runs.layout import RunDir, step_of
from deepgrpo.visible import visible

if TYPE_CHECKING:
    from deepgrpo.prompts.chat import Tools
    from deepgrpo.prompts.source import PromptSource


def read_final(directory: Path, spec: FinalConfig, step: int) -> dict[str, Any] | None:
    """The final evaluation of a run; None unless it exists, whole, for these questions and this checkpoint."""
    try:
        found: Any = json.loads(RunDir(directory).final.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(metrics := found.get("metrics"), dict):
        return None
    needed = ("eval/greedy", "eval/sampled", *(f"eval/pass@{k}" for k in spec.k))
    whole = all(isinstance(metrics.get(name), int | float) and math.isfinite(metrics[name]) for name in needed)
    return found if whole and found.get("step") == step and _same_spec(found.get("spec"), spec) else None


def _same_spec(found: Any, spec: FinalConfig) -> bool:
    """True if an evaluation was made as `spec` says; a key that it did not know had the default."""
    try:
        return parse_section(FinalConfig, found, "final.json") == spec
    except ConfigError:
        return False


def measure(directory: Path, spec: FinalConfig) -> dict[str, Any]:
    """Measure greedy accuracy on all untouched questions, sampled accuracy and pass@k on the first ones; write final.json.

    Raises DataError if no untouched question remains, ModelError if the run has no checkpoint.
    """
    from deepgrpo.engines.embedded.engine import EmbeddedEngine
    from deepgrpo.eval.evaluate import evaluate
    from deepgrpo.eval.model import find_model, load_model
    from deepgrpo.explore.environments import build_episodes, tools_of
    from deepgrpo.model.device import resolve_device, use_threads
    from deepgrpo.model.soundness import require_rows
    from deepgrpo.prompts.tasks import build_task
    from deepgrpo.rewards import build_reward
    from deepgrpo.runs.files import replace_file

    source = find_model(str(directory))
    config = source.run
    assert config is not None and spec.data is not None and spec.sampling is not None
    policy = load_model(source, resolve_device(config.run.device), "auto")
    use_threads(policy.model, config.run.threads)
    context = min(spec.sampling.max_total_tokens or policy.context, policy.context)
    sampling = spec.sampling.model_copy(update={"max_total_tokens": context})
    episodes = build_episodes(config.env, spec.data, policy)
    prompts, left_out, skipped = final_prompts(config, spec, policy.tokenizer, context, tools_of(episodes))
    require_rows(policy, lambda: prompts, "final.data")
    wanted = config.eval.reward or config.reward
    reward = build_reward(wanted, build_task(spec.data) if wanted.uses_task else None)
    engine = EmbeddedEngine.for_evaluation(policy, config.engine.max_rows)

    def figures(some: tuple[Prompt, ...], samples: int, k: tuple[int, ...]) -> dict[str, float]:
        result = evaluate(
            engine, reward, some, policy.tokenizer, sampling=sampling, samples=samples, k=k, seed=config.run.seed,
            truncated_value=wanted.truncated_value, success_threshold=config.explore.success_threshold,
            episodes=episodes,
        )  # fmt: skip
        return dict(result.metrics)

    try:
        greedy = figures(prompts, 0, ())
        sampled = figures(prompts[: spec.sampled_limit], spec.samples, spec.k)
    finally:
        reward.close()
        if episodes is not None:
            episodes.close()
    found = {
        "spec": spec.model_dump(mode="json"),
        "step": step_of(Path(source.path).parent.name),
        "questions": len(prompts),
        "sampled_questions": min(spec.sampled_limit, len(prompts)),
        "left_out": left_out,
        "skipped": skipped,
        # greedy figures cover all questions, sampled ones the sampled questions
        "metrics": {**sampled, **greedy},
    }
    replace_file(RunDir(directory).final, json.dumps(found, indent=1) + "\n")
    return found


def final_prompts(
    config: Config, spec: FinalConfig, tokenizer: Any, context: int, tools: Tools = None
) -> tuple[tuple[Prompt, ...], int, dict[str, int]]:
    """The questions of `spec` without those of eval.data, the number left out for that reason, and skipped rows by reason."""
    from deepgrpo.prompts.source import build_source

    assert spec.data is not None and config.eval.data is not None

    def source(data: DataConfig) -> PromptSource:
        return build_source(data, tokenizer, seed=0, context=context, shuffle=False, tools=tools)

    watched = {prompt.text for prompt in source(config.eval.data).head(config.eval.limit)}
    final = source(enough(spec.data, spec.limit + len(watched)))
    candidates = final.head(spec.limit + len(watched))
    kept = [prompt for prompt in candidates if prompt.text not in watched]
    if not kept:
        raise DataError("final.data has no question outside eval.data; name others")
    return tuple(kept[: spec.limit]), len(candidates) - len(kept), dict(final.skipped)


def enough(data: DataConfig, count: int) -> DataConfig:
    """Bound an endless data set, which would otherwise repeat questions."""
    if isinstance(data, GeneratedData) and data.size is None and data.limit is None:
        return data.model_copy(update={"limit": count})
    return data


def refuse_too_few(config: Config, spec: FinalConfig) -> None:
    """Raise ConfigError, before any run, if the synthetic task has too few distinct questions."""
    data = spec.data
    if not isinstance(data, GeneratedData) or data.size is not None or data.limit is not None:
        return
    watched = config.eval.limit
    try:
        synthetic.make_distinct(spec.limit + watched, data)
    except ConfigError as error:
        raise ConfigError(
            f"final.limit is {spec.limit}, and {watched} questions are used during training (eval.limit): together more "
            f"than the task has. {error}"
        ) from error


def _main(directory: str, spec: str) -> int:
    from deepgrpo.errors import DeepGRPOError

    follow_parent()
    try:
        raw = json.loads(Path(spec).read_text(encoding="utf-8"))
        found = measure(Path(directory), parse_section(FinalConfig, raw, spec))
    except DeepGRPOError as error:
        print(visible(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    shown = {key: round(value, 4) for key, value in found["metrics"].items() if key in ("eval/greedy", "eval/sampled")}
    for reason, count in found["skipped"].items():
        print(f"final.data: {count} rows left out ({reason})")
    print(f"untouched questions: {found['questions']}, {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
