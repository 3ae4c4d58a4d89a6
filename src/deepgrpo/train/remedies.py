"""Remedies of the warnings in health.py that depend on the recipe or on the kind of failure."""

from __future__ import annotations

import json

from deepgrpo.config import Config, EmbeddedEngineConfig, LossConfig

PROBLEM = "reward/problem_"
"""Start of the names of the metrics that count failed checks by kind."""

MOST = 0.5
"""Share of failed checks above which they explain that nothing is learned."""

REMEDIES = {
    "timeout": "raise reward.timeout_s (that of the part, if the reward has parts), or look at the responses in trees/",
    "crash": "the process that checks died: give it memory, or look for what the responses in trees/ make it do",
    "raised": "the check raised an error: try it on the responses in trees/ that scored 0",
    "not_finite": "the reward was NaN or infinite: return a finite number, or None for a response that cannot be scored",
    "no_answer": "the judge's server fails: look at it, raise retries or timeout_s, or lower concurrency",
    "refused": "the judge's server refuses requests: look at its log; the responses may be too long for its context",
    "unreadable": "the judge's answers have no score on the scale: ask in its prompt for the form that read and scale expect",
}
"""Kind of a failed check → remedy."""


def bound(change: str, loss: LossConfig) -> str:
    """Remedy by the upper bound of the chosen loss; a user's own has its own."""
    if loss.user_function:
        return ""
    key = "cispo_high" if loss.policy == "cispo" else "sequence_clip_high" if loss.ratio == "sequence" else "clip_high"
    return f"{change} loss.{key}"


def mismatch_cause(config: Config) -> str:
    """Why sampler and learner may give different log-probs in this recipe, likeliest cause first, and the remedy."""
    weights = 'keep loss.importance = "auto", which weighs for it'
    neutral = {"top_p": 1, "top_k": "none", "min_p": 0, "repetition_penalty": 1}
    for key, value in neutral.items():
        found = getattr(config.sampling, key)
        if found not in (value, None):
            return (
                f"sampling.{key} = {found} changes the sampler's distribution and not the learner's; {weights}, or set "
                f"sampling.{key} = {json.dumps(value)}"
            )
    if config.cluster is not None and config.cluster.overlap:
        return f"with cluster.overlap rollouts are one update old; {weights}; lower optim.lr, or set cluster.overlap = false"
    if config.engine_dtype != config.learner.dtype:
        return (
            f"the engine computes in {config.engine_dtype} and the learner in {config.learner.dtype}; {weights}, or set "
            f'engine.dtype = "learner"'
        )
    if config.learner.dtype == "bfloat16":
        return f'engine and learner round differently in bfloat16; {weights}, or set learner.dtype = "float32"'
    if not isinstance(config.engine, EmbeddedEngineConfig):
        return f'vLLM computes otherwise than the learner; {weights}, or set engine.type = "embedded"'
    return "no cause is known: test the model with `deepgrpo doctor`, and report it with the recipe"
