"""Flags that Megatron takes beside a pattern of layers, and that no HybridModel of it reads."""

from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode

FLAG = "--hybrid-layer-pattern"
POSITIONS = ("learned_absolute", "rope", "yarn", "none")
ATTENTION = "*+D"
UNREAD = (
    "use_rope_scaling",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
)
VARIANTS = {"gated_delta_net": "G", "dsa": "D"}  # how a GPT asks for them -> how a pattern does
OWN_SPEC = ("megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec")


def check_only_gpt(args: Any, pattern: str) -> None:
    """Raise ConfigError for a flag that acts in a GPT and does nothing in a HybridModel."""
    made = f"{FLAG} ({pattern}) makes a HybridModel"
    for name in UNREAD:
        if getattr(args, name, None):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for a GPT, and {made}, which does not read it; "
                "leave it out"
            )
    kind = args.position_embedding_type
    if kind not in POSITIONS:
        raise ConfigError(
            f"--position-embedding-type ({kind}) is for a GPT, and {made}, which would have no "
            "positions; use --position-embedding-type rope"
        )
    if args.multi_latent_attention and not set(pattern) & set("+D"):
        latent = pattern.replace("*", "+")
        use = f", or {FLAG} '{latent}'" if "*" in pattern else ""
        raise ConfigError(
            f"--multi-latent-attention is for a GPT, and {made}, in which latent attention is +; "
            f"leave it out{use}"
        )
    _check_variant(args, pattern, made)
    _check_local(args, made)
    _check_counted(args, pattern)


def _check_variant(args: Any, pattern: str, made: str) -> None:
    variant = getattr(args, "experimental_attention_variant", None)
    symbol = VARIANTS.get(variant or "", "")
    if variant and symbol not in pattern:
        raise ConfigError(
            f"--experimental-attention-variant ({variant}) is for a GPT, and {made}, in which it "
            f"is {symbol}; leave it out, or use {symbol} in the pattern"
        )
    frequency = getattr(args, "linear_attention_freq", None)
    if frequency and "G" not in pattern:
        raise ConfigError(
            f"--linear-attention-freq ({frequency}) is for a GPT, and {made}, in which each G is a "
            "gated delta net; leave it out"
        )


def _check_local(args: Any, made: str) -> None:
    theirs = not args.spec or tuple(args.spec) == OWN_SPEC
    if theirs and args.transformer_impl == "local" and not cpu_mode.wanted():
        raise ConfigError(
            f"--transformer-impl (local) is for a GPT, and {made}, whose layers on a GPU are "
            "those of Transformer Engine; leave it out"
        )


def _check_counted(args: Any, pattern: str) -> None:
    """Refuse numbers of layers at which the pattern has no attention."""
    symbols = pattern.split("/")[0].replace("|", "")
    picked = {"--no-rope-freq": (getattr(args, "no_rope_freq", None), 1)}
    if args.window_size:
        picked["--window-attn-skip-freq"] = (args.window_attn_skip_freq, 0)
    for flag, (value, entry) in picked.items():
        if isinstance(value, int):
            layers = [(place + 1) % value == 0 for place in range(len(symbols))]
        elif value and len(value) == len(symbols):
            layers = [bool(one) == bool(entry) for one in value]
        else:
            continue  # not given, or Megatron says what is wrong with it
        attention = [place for place, symbol in enumerate(symbols) if symbol in ATTENTION]
        if not attention or any(layers[place] for place in attention):
            continue
        if not any(layers):
            continue  # a list that asks for nothing
        example = [1 - entry] * len(symbols)
        example[attention[-1]] = entry
        shown = ",".join(map(str, example))
        raise ConfigError(
            f"{flag} ({value}) counts the symbols of {FLAG} ({pattern}), and none that it picks is "
            f"attention; use {flag} '[{shown}]'"
        )
