"""A step of TRL's GRPOTrainer, itself and unchanged: it samples, scores and updates as in any run with it.

What it is given is what our arm `grpo` has: the prompts, the number of rollouts and tokens, the rows of a forward pass
(as many as our token budget holds), no KL term, no gradient checkpointing, both rewards in every group. Its choices are
left alone: `generate` of transformers for sampling (or, if asked for, transformers' continuous batching), its loss, its
fused AdamW. Counted is a step from `on_step_begin` to `on_step_end`; the sampling is
inside, as TRL samples when it prepares the inputs of the first forward pass.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from typing import Any

import torch

from benchmarks.arms import Arm, BenchSetting, LeftOutError, Timed
from benchmarks.baselines.hf_generate import continuous_settings, plain_copy
from benchmarks.workloads import Workload, build_trees
from deepgrpo.model.policy import Policy


def trl_arm(
    setting: BenchSetting, name: str, policy: Policy, workload: Workload, dtype: torch.dtype, continuous: bool = False
) -> Arm:
    """One step per run. Raises LeftOutError without TRL.

    Args:
        dtype: bfloat16 is that of TRL's weights and moments too: faster than autocast over float32 weights.
        continuous: sample by transformers' continuous batching.
    """
    try:
        import trl
    except ImportError:
        raise LeftOutError("TRL is not installed; pip install 'trl==1.16.*'") from None
    with warnings.catch_warnings():
        # between TRL and transformers, nothing that we call
        warnings.simplefilter("ignore", FutureWarning)
        trainer, clock = build_trainer(setting, policy, workload, dtype, continuous)

    def run() -> Timed:
        # each call is a run of one step; optimizer and moments stay, and starting it is not counted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.train()
        return Timed(clock.tokens, clock.seconds)

    rows = trainer.args.per_device_train_batch_size
    sampler = "continuous batching" if continuous else "generate"
    note = f"TRL's GRPOTrainer, {sampler}, {rows} rows at a time, weights in {str(dtype).removeprefix('torch.')}"
    return Arm(name, run, note, versions={"trl": trl.__version__})


def build_trainer(
    setting: BenchSetting, policy: Policy, workload: Workload, dtype: torch.dtype, continuous: bool
) -> tuple[Any, Any]:
    """The trainer of one step and the callback that times it: `seconds` and sampled `tokens` of the last step."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        seconds = began = 0.0
        tokens = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.tokens = sum(map(len, completion_ids))
        return [float(i % 2) for i in range(len(completion_ids))]  # both rewards in every group: all tokens are trained

    total = workload.prompts * workload.rollouts
    fitting = max(1, setting.budget // (workload.prompt + workload.response))
    rows = max(n for n in range(1, total + 1) if total % n == 0 and n <= fitting)
    output = setting.closing.enter_context(tempfile.TemporaryDirectory(prefix="deepgrpo-trl-"))
    clock, model, tokenizer = Clock(), plain_copy(policy, dtype), _numbers(workload.vocabulary)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output, max_steps=1, num_generations=workload.rollouts, max_completion_length=workload.response,
            per_device_train_batch_size=rows, gradient_accumulation_steps=total // rows,
            learning_rate=1e-9, lr_scheduler_type="constant", beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
            gradient_checkpointing=False, bf16=False, use_cpu=policy.device.type == "cpu", use_vllm=False,
            shuffle_dataset=False, dataloader_pin_memory=False, dataloader_num_workers=0,
            use_transformers_continuous_batching=continuous,
            transformers_continuous_batching_config=continuous_settings(workload) if continuous else None,
            report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [" ".join(map(str, tree.prompt.tokens)) for tree in build_trees(workload)]}
        ),
        processing_class=tokenizer,
        callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def _numbers(vocabulary: int) -> Any:
    """A tokenizer whose text is the token ids themselves: "17 4" is (17, 4). Its end of text is no token of the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # special tokens are cut out of any text, also "0" out of "50": words that no number holds. Prompts begin at 10
    ids = {"<pad>": 0, **{str(i): i for i in range(1, vocabulary)}, "<eos>": vocabulary}
    core = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
