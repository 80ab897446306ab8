"""Tiny checkpoints that conversions read, made once and given to both checkouts."""

import shlex
from pathlib import Path
from typing import Any

import torch
from checkout import RUN, Checkout

MODEL = shlex.split(
    """
    --transformer-impl local --num-layers 3 --hidden-size 32 --ffn-hidden-size 64
    --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --swiglu
    --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
    --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-2 --mock-data
    --lr-decay-style constant --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0
    --eval-iters 0 --eval-interval 100 --log-interval 1 --seed 11 --save-interval 2
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
    """
)
PER_RANK = shlex.split(
    """
    --ckpt-format torch --num-experts 4 --moe-router-topk 2 --tensor-model-parallel-size 2
    --sequence-parallel --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2
    --no-save-optim
    """
)
SHARED: dict[str, Any] = {
    "vocab_size": 96,
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
LATENT = {
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
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # folder -> class of the settings, its own
    "llama": ("LlamaConfig", {}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
}


def make(checkout: Checkout, folder: Path) -> None:
    """Train a dense model, and one with experts saved by rank; draw Hugging Face models."""
    script = str(checkout.root / "recipes" / "pretrain_gpt.py")
    board = folder / "run" / "tensorboard"  # as recipes/quickstart.sh leaves one for `report`
    flags = ("--ckpt-format", "torch_dist", "--save", str(folder / "dense"))
    flags = (*MODEL, *flags, "--tensorboard-dir", str(board / "dense"))
    checkout.run(*RUN, script, *flags, ranks=1).check()
    flags = (*MODEL, *PER_RANK, "--save", str(folder / "per_rank"))
    checkout.run(*RUN, script, *flags, "--tensorboard-dir", str(board / "moe"), ranks=4).check()
    for name in FAMILIES:
        draw(name, folder / name)


@torch.no_grad()
def draw(name: str, folder: Path) -> None:
    """Save a Hugging Face model in several shards: random weights, norms around 1."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind, own = FAMILIES[name]
    config = getattr(transformers, kind)(**{**SHARED, **own})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    for parameter, values in (*model.named_parameters(), *model.named_buffers()):
        if "rotary" not in parameter:
            centre = 1.0 if "norm" in parameter and name != "gemma" else 0.0
            values.copy_(torch.randn(values.shape, generator=generator) * 0.1 + centre)
    model.float().save_pretrained(folder, max_shard_size="20KB")
