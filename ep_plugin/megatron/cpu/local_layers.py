"""A HybridModel of Megatron's local layers: its own specs are of Transformer Engine's.

Attention, latent attention, dense blocks and experts are those of Megatron's local GPT layers, one
to a symbol of the pattern. Checkpoints have the names of its Transformer Engine layers, so that
either loads the other's.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

MODEL = "megatron.core.models.hybrid.hybrid_model"
BLOCK = "megatron.core.models.hybrid.hybrid_block"
TRANSLATION = "megatron.core.dist_checkpointing.gpt_checkpoint_interop"
NORM_BEFORE_EXPERTS = "decoder.layers.pre_mlp_layernorm."
NORM_IN_FC1 = "decoder.layers.mlp.linear_fc1.layer_norm_"
NORM_OF_ATTENTION = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
NORM_OF_BLOCK = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def with_local_layers(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    """Build a HybridModel of local layers where Megatron's own spec was asked for."""
    specs = import_module("megatron.core.models.hybrid.hybrid_layer_specs")
    config = kwargs["config"] if "config" in kwargs else args[0]
    local = local_stack(config)

    def replaced(value: Any) -> Any:
        return local if value is specs.hybrid_stack_spec else value

    original(model, *map(replaced, args), **{name: replaced(v) for name, v in kwargs.items()})


def local_norm(config: Any, hidden_size: int, eps: float, **_: Any) -> Any:
    """Make the norm behind the last layer, in place of Transformer Engine's."""
    norm = import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    return norm(config=config, hidden_size=hidden_size, eps=eps)


def local_stack(config: Any) -> Any:
    """Return the spec of a HybridStack of local layers, for a TransformerConfig.

    Mamba and gated delta net have no local layers: those places are left empty.
    """
    block = import_module(BLOCK)
    layers = import_module("megatron.core.transformer.transformer_layer")
    spec = import_module("megatron.core.transformer.spec_utils").ModuleSpec
    mlp_layer = import_module("megatron.core.ssm.mlp_layer").MLPLayer
    moe = import_module("megatron.core.models.gpt.moe_module_specs").get_moe_module_spec

    def one(module: Any, **parts: Any) -> Any:
        return spec(module=module, submodules=layers.TransformerLayerSubmodules(**parts))

    def attention(latent: bool) -> Any:
        parts = _gpt_layer(config, latent)
        names = {} if latent else {"sharded_state_dict_keys_map": NORM_OF_ATTENTION}
        return one(
            layers.TransformerLayer,
            input_layernorm=parts.input_layernorm,
            self_attention=parts.self_attention,
            self_attn_bda=parts.self_attn_bda,
            **names,
        )

    parts = _gpt_layer(config, latent=False)
    of_block = {"pre_mlp_layernorm": parts.pre_mlp_layernorm, "mlp_bda": parts.mlp_bda}
    return spec(
        module=block.HybridStack,
        submodules=block.HybridStackSubmodules(
            attention_layer=attention(latent=False),
            **({"mla_layer": attention(latent=True)} if _has_latent(block) else {}),
            mlp_layer=one(
                mlp_layer, mlp=parts.mlp, sharded_state_dict_keys_map=NORM_OF_BLOCK, **of_block
            ),
            moe_layer=one(
                layers.TransformerLayer,
                mlp=moe(use_te=False, num_experts=8, moe_grouped_gemm=True),
                **of_block,
            ),
        ),
    )


def _has_latent(block: Any) -> bool:
    return "mla_layer" in block.HybridStackSubmodules.__dataclass_fields__


def _gpt_layer(config: Any, latent: bool) -> Any:
    """Return the parts of one local layer of a GPT."""
    specs = import_module("megatron.core.models.gpt.gpt_layer_specs")
    layer = specs.get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm and not latent,  # of latent ones, Megatron refuses it
        multi_latent_attention=latent,
        normalization=config.normalization,
    )
    return layer.submodules


def changes(patches: Patches) -> None:
    """Let Megatron load a GPT of local layers into a HybridModel, where it can (from 0.19 on).

    Both name the norm before experts otherwise; a GPT of Transformer Engine's layers does not.
    """
    if find_spec(TRANSLATION) is None:
        return
    local: list[bool] = []  # of the checkpoint that is being loaded

    def set_up(
        original: Callable[..., Any], args: Any, saved: Any, *rest: Any, **named: Any
    ) -> Any:
        local[:] = [getattr(saved, "transformer_impl", None) == "local"]
        return original(args, saved, *rest, **named)

    def retarget(original: Callable[..., None], state: Any, *rest: Any, **named: Any) -> None:
        original(state, *rest, **named)
        if local == [True]:
            import_module("megatron.core.dist_checkpointing.dict_utils").dict_list_map_inplace(
                _as_local_gpt, state
            )

    why = "a GPT of local layers names the norm before experts as if fc1 had it"
    patches.wrap("megatron.training.checkpointing:_maybe_setup_gpt_to_hybrid_load", set_up, why)
    patches.wrap(f"{TRANSLATION}:retarget_sharded_state_dict_to_gpt_checkpoint", retarget, why)


def _as_local_gpt(entry: Any) -> Any:
    """Name a GPT's norm before its experts as its local layers save it, in place."""
    key = getattr(entry, "key", None)
    if isinstance(key, str):
        entry.key = key.replace(NORM_BEFORE_EXPERTS, NORM_IN_FC1)
    return entry
