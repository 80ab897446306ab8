"""Tiny models of every Hugging Face family, with weights that nothing about them is trivial in."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from ep_plugin.checkpoint.formats.hf_safetensors import INDEX

VOCAB = 96
SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_YARN = {
    "rope_theta": 5000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
_LLAMA3 = {
    "rope_theta": 5000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# case -> (class of the settings, settings of its own)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": _LLAMA3}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 9}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {**_EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "qwen3_moe-unnormalised": (
        transformers.Qwen3MoeConfig,
        {**_EXPERTS, "head_dim": 16, "norm_topk_prob": False},
    ),
    "deepseek_v2": (transformers.DeepseekV2Config, {**_LATENT, "topk_method": "greedy"}),
    "deepseek_v2-groups": (
        transformers.DeepseekV2Config,
        {
            **_LATENT,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "rope_parameters": _YARN,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v2-best": (  # as the 236B model: three groups by their best score, two experts each
        transformers.DeepseekV2Config,
        {
            **_LATENT,
            "n_routed_experts": 16,
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek_v3-half": (  # one expert of each group, ranked by its best two
        transformers.DeepseekV3Config,
        {**_LATENT, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3": (transformers.DeepseekV3Config, {**_LATENT, "rope_parameters": _YARN}),
}


def model_type(case: str) -> str:
    return case.partition("-")[0]


def settings(case: str) -> Any:
    kind, own = CASES[case]
    return kind(**{**SHARED, **own})


@torch.no_grad()
def save(case: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a model in several shards: random weights and biases, norms around 1."""
    config = settings(case)
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if "rotary" not in name:
            centre = 1.0 if "norm" in name and case != "gemma" else 0.0
            values.copy_(torch.randn(values.shape, generator=generator) * 0.1 + centre)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file()
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor with the package's own loader."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Return what transformers computes in float32, [2, 40, V]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
    output: Tensor = model(tokens).logits
    return output
