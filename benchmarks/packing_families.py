"""Write docs/packing.md: which model families of transformers can be trained on tree packs, by tiny random models.

    python -m benchmarks.packing_families > docs/packing.md
"""

from __future__ import annotations

import os
import warnings

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import torch  # noqa: E402  (after the environment is set)
import transformers  # noqa: E402
from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # noqa: E402

from deepgrpo.model.tree_gate import judge_model  # noqa: E402

FAMILIES = (  # noqa: SIM905  (a list of strings would be three times as long)
    "llama qwen2 qwen3 smollm3 mistral ministral gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 gpt2 "
    "gpt_neox gpt_neo gptj opt bloom mpt falcon codegen starcoder2 cohere cohere2 granite stablelm glm "
    "glm4 exaone4 nemotron persimmon gpt_bigcode qwen2_moe qwen3_moe mixtral olmoe granitemoe deepseek_v2 "
    "deepseek_v3 gpt_oss llama4_text qwen3_next qwen3_5_text lfm2 mamba mamba2 falcon_h1 bamba jamba "
    "recurrent_gemma rwkv minimax helium ernie4_5 hunyuan_v1_dense apertus arcee diffllama doge xglm "
    "biogpt seed_oss dots1 glm4_moe nanochat vaultgemma olmo_hybrid xlstm "
).split()

# one set of names for all families: each takes what it knows and ignores the rest
SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sliding_window": 16, "use_sliding_window": False, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_embd": 64, "n_layer": 4, "n_head": 4,
    "n_positions": 512, "n_inner": 96, "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 512, "ffn_dim": 96,
    "word_embed_proj_dim": 64, "attention_hidden_size": 64, "shared_expert_intermediate_size": 32, "q_lora_rank": 32,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0,
    "activation_dropout": 0.0, "rotary_dim": 8, "layerdrop": 0.0, "query_pre_attn_scalar": 16, "intermediate_size_mlp": 96,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 8, "mamba_expand": 2, "state_size": 8,
    "attention_types": [[["global"], 4]], "window_size": 512, "hidden_dropout": 0.0, "conv_kernel": 4, "num_heads": 4,
    "lru_width": 64, "ffn_hidden_size": 96, "expand": 2,
}  # fmt: skip
SPECIAL = {
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 8},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8},
}


def verdict_of(family: str) -> tuple[str, str, str]:
    """(packs, window, reason) of a tiny random model of a family."""
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SHAPE, **SPECIAL.get(family, {})})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0)  # sharper attention: a wrong neighbour shows
    except Exception as error:
        return "not built", "", f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    # from_config leaves dropout rates where a family names them otherwise; a loaded model has none (policy.py)
    verdict = judge_model(model)
    window = "" if verdict.window is None else str(verdict.window)
    return "yes" if verdict.packs else "no", window, verdict.reason


def main() -> None:
    print("# Which families can be packed\n")
    print(
        "Made by `python -m benchmarks.packing_families` with tiny random models (4 layers, hidden size 64, sliding window 16\n"
        f"where a family has one), transformers {transformers.__version__}, torch {torch.__version__}, on the CPU. "
        "`deepgrpo doctor MODEL` asks your model\nitself. A family that cannot be packed is trained on a row per path.\n"
    )
    print("| family | packed | longest path | why |\n|---|---|---|---|")
    rows = [(family, *verdict_of(family)) for family in FAMILIES]
    for family, packs, window, reason in rows:
        print(f"| {family} | {packs} | {window} | {reason.replace('|', '/')} |")
    count = sum(row[1] == "yes" for row in rows)
    print(f"\n{count} of {len(rows)} packed.")


if __name__ == "__main__":
    main()
