"""DEEP-GRPO in a training loop of one's own: torch, a model of transformers, and four pure functions of deepgrpo.

A small model with random weights learns to count on: after 7 come 8 9 0 1 2 3. The reward is the share of digits before the
first wrong one. Rollouts that fail are sampled again from a pivot, and both streams are trained. It takes some ten seconds.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepgrpo import dual_stream_loss, fit_recoverability, group_advantages, select_pivots

LENGTH, ROLLOUTS, BRANCHES = 6, 8, 4


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=10, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH + 1, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


@torch.no_grad()
def sample(model: LlamaForCausalLM, ids: torch.Tensor, keep: torch.Tensor, greedy: bool = False) -> torch.Tensor:
    """Fill rows `[B, 1 + LENGTH]` behind the prompt and the first `keep` digits of the response."""
    ids = ids.clone()
    for t in range(1, LENGTH + 1):
        probs = model(ids[:, :t]).logits[:, -1].softmax(-1)
        new = probs.argmax(-1) if greedy else torch.multinomial(probs, 1)[:, 0]
        ids[:, t] = torch.where(t <= keep, ids[:, t], new)
    return ids


def score(ids: torch.Tensor) -> torch.Tensor:
    right = ids[:, 1:] == (ids[:, :1] + torch.arange(1, LENGTH + 1)) % 10
    return right.int().cumprod(1).float().mean(1)


def evaluate(model: LlamaForCausalLM) -> float:
    prompts = torch.arange(10)[:, None].repeat(1, LENGTH + 1)
    return score(sample(model, prompts, torch.zeros(10), greedy=True)).mean().item()


def train(steps: int = 120, seed: int = 0) -> tuple[float, float]:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    before, ratios, outcomes = evaluate(model), [], []
    for step in range(1, steps + 1):
        prompts = torch.arange(10).repeat_interleave(ROLLOUTS)[:, None].repeat(1, LENGTH + 1)
        main = sample(model, prompts, torch.zeros(len(prompts)))
        rewards = score(main)
        advantages = group_advantages(rewards.view(10, ROLLOUTS)).flatten()
        ids, keep, failed = main, torch.zeros(len(main)), torch.nonzero(rewards < 1)[:, 0]
        if len(failed):  # one pivot in each, where a digit ends; P(success | depth) from the pivots so far
            chance = fit_recoverability(ratios[-500:], outcomes[-500:])
            drawn = [select_pivots(range(1, LENGTH + 1), recoverability=chance, random=random) for _ in failed]
            offsets = torch.tensor([draw.offsets[0] for draw in drawn]).repeat_interleave(BRANCHES)
            branches = sample(model, main[failed].repeat_interleave(BRANCHES, 0), offsets)
            found = score(branches).view(-1, BRANCHES)
            ids, keep = torch.cat([main, branches]), torch.cat([keep, offsets])
            advantages = torch.cat([advantages, group_advantages(found).flatten()])
            ratios += [draw.ratios[0] for draw in drawn]
            outcomes += (found.max(1).values == 1).tolist()
        mask = torch.arange(LENGTH) >= keep[:, None]  # a branch does not train its prefix
        logprobs = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        loss = dual_stream_loss(logprobs, advantages, branch=torch.arange(len(ids)) >= len(main), mask=mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}  reward {rewards.mean():.2f}  {len(failed)} pivots  greedy {evaluate(model):.2f}")
    return before, evaluate(model)


if __name__ == "__main__":
    print("greedy reward: {:.2f} before, {:.2f} after".format(*train()))
