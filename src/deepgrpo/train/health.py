"""Warnings when a run cannot learn or is about to stop learning: the cause, the figure and the remedy.

A pure function of (state, metrics). The state is stored in checkpoints, so a resumed run neither repeats its warnings nor
forgets a streak. A cause is reported once, and again only after it has gone away and returned. A metric that is missing or
not finite leaves its causes unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from deepgrpo.config import Config, EmbeddedEngineConfig, MathReward, UserReward, WeightedReward, template_of
from deepgrpo.train.health_state import HealthState, Metrics, See, finite
from deepgrpo.train.remedies import MOST, PROBLEM, REMEDIES, bound, mismatch_cause


@dataclass(frozen=True, slots=True)
class HealthMonitor:
    """Limits, and the settings that the remedies name.

    Example: HealthMonitor(max_new_tokens=256, dead_steps=10).check(HealthState(), {"main/truncated": 0.97}).
    """

    max_new_tokens: int
    max_turns: int | None = None
    """Most turns of an episode; None without an environment."""
    dead_steps: int = 10
    rollouts_per_step: int = 0
    """Main rollouts scored in a step; 0: unknown, so the share of failed checks is not watched."""
    branching: bool = True
    """True if the strategy samples branches."""
    few_share: float = 0.02
    """Branch rows as a share of main rows below which full lambda is too much for them; 0: not watched."""
    lambda_: float = 1.0
    """Weight of the branch stream."""
    answer_place: str = ""
    """Setting that says where the reward looks for the answer, e.g. `reward.answer_format = "boxed"`."""
    template: str = ""
    """Setting that says how the prompt asks for it, e.g. `data.template.preset = "gsm8k"`."""
    user_reward: bool = False
    """True if the reward is the user's own function, whose scale is not known."""
    loose: str = "raise loss.clip_high"
    """Remedy of a collapse by the bound of the chosen loss; empty if it has none."""
    tight: str = "lower loss.clip_high"
    """Remedy of an explosion likewise."""
    mismatch_cause: str = "test the model with `deepgrpo doctor`"
    """Why the recipe's sampler and learner may differ, and the remedy."""
    truncated_share: float = 0.9
    unparsed_share: float = 0.9
    problem_share: float = 0.05
    """Failed checks (time-outs, crashes) as a share of the step's checks."""
    low_entropy: float = 0.01
    """Nats per token."""
    entropy_growth: float = 3.0
    """Explosion: this multiple of the first step's entropy, and at least one nat above it."""
    mismatch_kl: float = 0.05
    """Nats per token between the sampler's and the learner's distribution."""

    @classmethod
    def from_config(cls, config: Config) -> HealthMonitor:
        """Build the monitor of a recipe."""
        explore, reward, loss = config.explore, config.reward, config.loss
        place = f'reward.type = "{reward.type}"'
        if isinstance(reward, MathReward):
            place = f'reward.answer_format = "{reward.answer_format}"'
        return cls(
            max_new_tokens=config.sampling.max_new_tokens,
            max_turns=config.env.max_turns if config.env is not None else None,
            dead_steps=config.log.dead_steps,
            rollouts_per_step=config.run.prompts_per_step * explore.num_rollouts,
            # a first epoch without branches is no fault of a strategy that waits for prompts to come again
            branching=explore.most_branches > 0 and not explore.needs_epochs,
            # merged streams, and a lambda that falls with the rows, give no row too much weight
            few_share=0.0 if loss.streams == "merged" or loss.full_branch_sequences else config.log.few_branches,
            lambda_=loss.lambda_,
            answer_place=place,
            template=f'data.template.preset = "{template_of(config.data).preset}"',
            user_reward=isinstance(reward, UserReward | WeightedReward),
            loose=bound("raise", config.loss),
            tight=bound("lower", config.loss),
            mismatch_cause=mismatch_cause(config),
            # the embedded engine samples with the learner's own weights, so only rounding can differ
            mismatch_kl=0.01 if isinstance(config.engine, EmbeddedEngineConfig) else 0.05,
        )

    def check(self, state: HealthState, metrics: Metrics) -> tuple[HealthState, tuple[str, ...]]:
        """Check one step's metrics.

        Reads main/truncated, main/unparsed, main/mixed, main/reward, main/entropy, branch/mixed (shares, mean reward,
        nats), reward/problems and reward/problem_* (counts of the step), branch/rollouts, branch/groups, main/sequences,
        branch/sequences,
        loss/dropped_few_branches, pivots/count, mismatch/kl.

        Returns the next state and the warnings to show now, in a fixed order.
        """
        see = partial(finite, metrics)
        state = state.after(see, few_share=self.few_share if self.lambda_ > 0 else 0.0)
        mixed, sequences, entropy = see("main/mixed"), see("branch/sequences"), see("main/entropy")
        found: dict[str, str | None] = {}
        if (share := see("main/truncated")) is not None:
            found["truncated"] = self._truncated(share) if share >= self.truncated_share else None
        if (share := see("main/unparsed")) is not None:
            found["unparsed"] = self._unparsed(share) if share >= self.unparsed_share else None
        if (problems := see("reward/problems")) is not None and self.rollouts_per_step:
            failed = problems / (self.rollouts_per_step + (see("branch/rollouts") or 0))
            found["problems"] = self._problems(metrics, problems, failed) if failed > self.problem_share else None
        else:
            failed = 0.0
        # rollouts that all fail for one of these reasons need no easier questions
        reason = "most checks of the reward fail: repair the reward first" if failed >= MOST else None
        if reason is None and found.get("truncated"):
            reason = "nearly all rollouts are cut off: see to their length first"
        if reason is None and found.get("unparsed"):
            reason = "in nearly all of them no answer is found: see to its place first"
        if mixed is not None:
            dead = state.dead >= self.dead_steps
            found["dead"] = self._dead(state.dead, see("main/reward"), reason) if dead else None
        if entropy is not None:
            first = state.first_entropy or 0.0
            found["collapse"] = self._collapse(entropy, first) if entropy < self.low_entropy else None
            exploded = entropy >= self.entropy_growth * first and entropy >= first + 1
            found["explosion"] = self._explosion(entropy, first) if exploded else None
        if (kl := see("mismatch/kl")) is not None:
            found["mismatch"] = self._mismatch(kl) if kl > self.mismatch_kl else None
        if sequences is not None and self.branching:
            long = state.empty >= self.dead_steps
            found["empty"] = self._empty(state.empty, see, reason) if long else None
            found["few"] = self._few(sequences, see("main/sequences") or 0) if state.few >= self.dead_steps else None

        new = tuple(text for cause, text in found.items() if text is not None and cause not in state.active)
        active = {cause for cause in state.active if cause not in found}
        active |= {cause for cause, text in found.items() if text is not None}
        return replace(state, active=tuple(sorted(active))), new

    # ------------------------------------------------------------ the sentences

    def _truncated(self, share: float) -> str:
        if self.max_turns is not None:
            return (
                f"{share:.0%} of the episodes were cut off at env.max_turns = {self.max_turns}, env.max_turn_tokens or "
                f"sampling.max_new_tokens = {self.max_new_tokens} before they ended; raise these, or see in `deepgrpo inspect` "
                "whether the model repeats its calls"
            )
        return (
            f"{share:.0%} of the rollouts were cut off at sampling.max_new_tokens = {self.max_new_tokens} before they "
            "gave an answer; raise it, or check that the model ends its answers (chat template, EOS token, "
            "sampling.stop)"
        )

    def _unparsed(self, share: float) -> str:
        if self.user_reward:
            return (
                f"your reward returned None for {share:.0%} of the rollouts, which means that it found no answer in them: read "
                "a few rollouts in trees/, and make the prompt ask for what it looks for"
            )
        return (
            f"no answer was found in {share:.0%} of the rollouts: the reward ({self.answer_place or 'reward'}) looks "
            f"for it where the prompt ({self.template or 'data.template'}) does not ask for it, or the model ignores "
            "the request; make the two agree and read a few rollouts in trees/"
        )

    def _dead(self, steps: int, reward: float | None, reason: str | None) -> str:
        head = f"no group of rollouts was mixed in the last {steps} steps, so there is no advantage to learn from"
        if reason is not None:
            return f"{head}: {reason}"
        if self.user_reward and reward is not None:
            return (
                f"{head}: your reward gives all rollouts of a prompt the same (mean reward {reward:g}); check it on a good and "
                "a bad answer; if it tells them apart, raise sampling.temperature or explore.num_rollouts, or choose questions "
                "of middling difficulty"
            )
        if reward is not None and reward >= 0.98:
            return (
                f"{head}: all succeed (mean reward {reward:.2f}); the questions are too easy, choose harder data "
                "or stop here"
            )
        if reward is not None and reward <= 0.02:
            return (
                f"{head}: all fail (mean reward {reward:.2f}); try easier questions, more rollouts "
                "(explore.num_rollouts), a higher sampling.temperature, or a supervised warm start, and check "
                "the reward on an answer you know to be right"
            )
        figure = "" if reward is None else f" (mean reward {reward:.2f})"
        return (
            f"{head}: the rollouts of a prompt all agree{figure}; raise sampling.temperature or explore.num_rollouts, "
            "or choose questions of middling difficulty"
        )

    def _problems(self, metrics: Metrics, count: float, share: float) -> str:
        kinds = {name.removeprefix(PROBLEM): finite(metrics, name) or 0.0 for name in metrics if name.startswith(PROBLEM)}
        worst = max(kinds, key=lambda kind: kinds[kind], default="")
        remedy = REMEDIES.get(worst, "look at reward/problem_* in metrics.jsonl and at the responses in trees/")
        named = ", ".join(f"{kind.replace('_', ' ')}: {number:.0f}" for kind, number in sorted(kinds.items()))
        return (
            f"{count:.0f} checks of the reward failed in this step ({share:.0%}{'; ' + named if named else ''}) and scored 0; "
            f"{remedy}"
        )

    def _collapse(self, entropy: float, first: float) -> str:
        if first < self.low_entropy:
            return (
                f"the entropy is {entropy:.4f} nats per token (below {self.low_entropy}), as low as at the start: the start "
                "model is nearly deterministic, so rollouts hardly differ; raise sampling.temperature, or start from a model "
                "that was trained less on these questions"
            )
        bound = f"{self.loose}, " if self.loose else ""
        return (
            f"the entropy fell to {entropy:.4f} nats per token (below {self.low_entropy}): the policy has become "
            f"nearly deterministic and explores no more; lower optim.lr, {bound}raise loss.beta, or go back "
            "to an earlier checkpoint"
        )

    def _explosion(self, entropy: float, first: float) -> str:
        return (
            f"the entropy rose to {entropy:.2f} nats per token from {first:.2f} at the start: the policy is coming "
            f"apart; lower optim.lr, {self.tight + ', ' if self.tight else ''}or raise loss.beta, and go back to an earlier "
            "checkpoint"
        )

    def _mismatch(self, kl: float) -> str:
        return (
            f"the sampler's distribution is {kl:.3f} nats per token away from the learner's (above "
            f"{self.mismatch_kl}): {self.mismatch_cause}"
        )

    def _empty(self, steps: int, see: See, reason: str | None) -> str:
        head = f"the branch stream was empty in the last {steps} steps"
        pivots, reward = see("pivots/count"), see("main/reward")
        if reason is not None:
            return f"{head}: {reason}"
        if pivots is not None and pivots > 0:
            if see("loss/dropped_few_branches"):
                return (
                    f"{head} although the last one had {pivots:.0f} pivots: there were fewer branches with an advantage than "
                    "loss.min_branch_sequences; lower that minimum, or raise explore.branches_per_pivot"
                )
            return (
                f"{head} although the last one had {pivots:.0f} pivots: the branches of each pivot agree; raise "
                "explore.branches_per_pivot or sampling.temperature"
            )
        if not self.user_reward and reward is not None and reward >= 0.98:
            return f"{head}: no rollout failed (mean reward {reward:.2f}), so none is expanded; choose harder data"
        return (
            f"{head}: no pivot could be chosen; the rollouts may have no segment to branch at (explore.segments.type), "
            "or none has a reward at or below explore.success_threshold"
        )

    def _few(self, branches: float, rollouts: float) -> str:
        ratio = self.lambda_ * rollouts / branches
        return (
            f"in {self.dead_steps} steps in a row, few branches carried the whole loss.lambda = {self.lambda_:g}: "
            f"{branches:.0f} rows in the last one, beside {rollouts:.0f} of the main stream (below log.few_branches = "
            f"{self.few_share:g}), so one branch weighs as much as {ratio:.0f} rollouts; raise explore.branches_per_pivot, let "
            f"lambda grow with their number (loss.full_branch_sequences = {math.ceil(self.few_share * rollouts)}), or leave "
            "the stream out of such steps (loss.min_branch_sequences)"
        )
