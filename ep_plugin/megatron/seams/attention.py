"""Transformer Engine: whether a run needs it, and which attention it will run.

Transformer Engine chooses flash, fused or unfused attention by the shapes, the GPU and the loaded
cuDNN, and does not report its choice. Here the function that it uses for this is called before the
first step, and the result is printed.
"""

import dataclasses
import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams.patches import Patches

SETUP = "megatron.training.training:setup_model_and_optimizer"
EXTENSION = "megatron.core.extensions.transformer_engine"  # Megatron imports it through this
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"
LOCAL = (
    "--transformer-impl local --no-masked-softmax-fusion --no-gradient-accumulation-fusion "
    "--no-persist-layer-norm --no-rope-fusion"
)
# A usual GPT, for a question outside a run: heads as in Llama and Qwen, causal, bf16 by default.
USUAL = {
    "qkv_layout": "sbhd_sbhd_sbhd",
    "num_heads": 32,
    "num_gqa_groups": 8,
    "max_seqlen_q": 4096,
    "max_seqlen_kv": 4096,
    "head_dim_qk": 128,
    "head_dim_v": 128,
    "attn_mask_type": "causal",
    "window_size": (-1, 0),  # as Transformer Engine writes causal attention without a window
}


def check_installed(args: Any) -> None:
    """Raise ConfigError if layers must be Transformer Engine's and it cannot be imported.

    In CPU mode layers are Megatron's own, so nothing is checked.
    """
    wanted = args.transformer_impl == "transformer_engine" and args.spec is None
    if not wanted or cpu_mode.wanted() or import_module(EXTENSION).HAVE_TE:
        return
    missing = find_spec("transformer_engine") is None
    what = "is not installed" if missing else "cannot be imported here (ep-plugin doctor says why)"
    raise ConfigError(
        "--transformer-impl (transformer_engine), Megatron's default on GPUs, needs "
        f"Transformer Engine, which {what}; use {LOCAL}, or run {INSTALL}"
    )


def changes(patches: Patches, say: Callable[[str], None]) -> None:
    """Patch Megatron to say which attention will run.

    It is asked after the model is built, since only then --attention-backend has taken effect.
    """

    def with_word(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = import_module("megatron.training").get_args()
        if given.transformer_impl == "transformer_engine" and not cpu_mode.wanted():
            say(describe(shape_of(given)))
        return result

    patches.wrap(
        SETUP,
        with_word,
        "the model is built: Transformer Engine is asked which attention it will run",
    )


def shape_of(args: Any) -> dict[str, Any]:
    """Return, from Megatron's arguments, the parameters by which Transformer Engine chooses."""
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    key = value = args.kv_channels
    if args.multi_latent_attention:
        groups = args.num_attention_heads
        key, value = args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
    return {
        **USUAL,
        "qkv_dtype": args.params_dtype,
        "batch_size": args.micro_batch_size,
        "num_heads": args.num_attention_heads // tensor,
        "num_gqa_groups": max(1, groups // tensor),
        "max_seqlen_q": args.seq_length,
        "max_seqlen_kv": args.seq_length,
        "head_dim_qk": key,
        "head_dim_v": value,
        "window_size": getattr(args, "window_size", None) or USUAL["window_size"],
        "softmax_type": getattr(args, "softmax_type", "vanilla"),
        "attention_dropout": args.attention_dropout,
        "context_parallel": context > 1,
        "cp_size": context,
        "cp_comm_type": (args.cp_comm_type or ["p2p"])[0],
        "deterministic": bool(args.deterministic_mode)
        or os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0",
    }


def describe(shape: dict[str, Any] | None = None) -> str:
    """Return, as a text, which attention Transformer Engine will run for `shape` or USUAL.

    Needs a GPU. Environment variables are read as they are now; Megatron sets those of
    --attention-backend when it builds the model.
    """
    release = _release()
    try:
        chosen, cudnn = _ask(shape or USUAL), _cudnn()
    except Exception as error:  # an unknown interface, or a library that does not load
        return f"Transformer Engine {release} cannot be asked ({type(error).__name__}: {error})"
    text = f"{chosen} attention of Transformer Engine {release}, {cudnn}"
    if chosen == "no":
        return (
            f"{text}: none of its attentions takes this model on this GPU, and the first step will "
            "fail; NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 says why"
        )
    if chosen == "unfused":
        text += (
            "; this is slow where fused attention could run: NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 says "
            "why, and a second cuDNN in LD_LIBRARY_PATH is a usual reason: take it out"
        )
    return text


def _ask(shape: dict[str, Any]) -> str:
    """Return Transformer Engine's choice: flash, fused, unfused or no.

    Parameters in `shape` that its version does not have are left out.
    """
    import_module("transformer_engine.pytorch")
    utils = import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    known = {field.name for field in dataclasses.fields(utils.AttentionParams)}
    asked = utils.AttentionParams(**{name: shape[name] for name in shape.keys() & known})
    flash, _, fused, _, unfused, *_ = utils.get_attention_backend(asked)
    chosen = {"flash": flash, "fused": fused, "unfused": unfused}
    return next((name for name, taken in chosen.items() if taken), "no")


def _release() -> str:
    for name in ("transformer-engine", "transformer-engine-torch"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _cudnn() -> str:
    """Return the version and the folders of the cuDNN that this process has loaded."""
    numbers = import_module("transformer_engine.pytorch.utils").get_cudnn_version()
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    files = [line.split(maxsplit=5)[5] for line in lines if "/libcudnn" in line]
    folders = sorted({str(Path(file).parent) for file in files})
    where = f" of {' and '.join(folders)}" if folders else ""
    return f"cuDNN {'.'.join(map(str, numbers))}{where}"
