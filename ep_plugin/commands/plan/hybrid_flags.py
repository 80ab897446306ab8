"""The flags of `plan --hybrid-layer-pattern`: Megatron's own, with its defaults, as far as they are
about sizes."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from ep_plugin.commands.law import Need
from ep_plugin.commands.plan.layers import Sizes
from ep_plugin.commands.plan.pattern import FLAG, Pattern, parse
from ep_plugin.errors import ConfigError
from ep_plugin.moe.routing_config import MOST_EXPERTS
from ep_plugin.typed_words import WrongWord, of_flag
from ep_plugin.untrusted import shown


class Size(NamedTuple):
    """A flag that is a size."""

    flag: str
    summary: str
    symbols: str = ""  # it acts for; none: for every layer
    default: int | None = None


OF_LATENT, OF_MAMBA, OF_DELTA, OF_EXPERTS = "+", "M", "G", "E"
SIZES = (
    Size("--hidden-size", "values of a token"),
    Size("--vocab-size", "entries of the vocabulary"),
    Size("--make-vocab-size-divisible-by", "times tp, it is padded to a multiple", default=128),
    Size("--max-position-embeddings", "learned positions"),
    Size("--num-attention-heads", "heads of * and +; Megatron asks for them always"),
    Size("--num-query-groups", "heads of keys and values, with --group-query-attention", "*"),
    Size("--kv-channels", "values of a head (default: hidden size over heads)", "*"),
    Size("--q-lora-rank", "latent of queries (default: none)", OF_LATENT),
    Size("--kv-lora-rank", "latent of keys and values", OF_LATENT, 32),
    Size("--qk-head-dim", "values of a head without position", OF_LATENT, 128),
    Size("--qk-pos-emb-head-dim", "values of a head with position", OF_LATENT, 64),
    Size("--v-head-dim", "values of a head's value", OF_LATENT, 128),
    Size("--ffn-hidden-size", "of a dense block (default: Megatron's, 4 times hidden)", "-E"),
    Size("--num-experts", "experts of a layer", OF_EXPERTS),
    Size("--moe-router-topk", "experts of a token", OF_EXPERTS, 2),
    Size("--moe-ffn-hidden-size", "of an expert (default: --ffn-hidden-size)", OF_EXPERTS),
    Size("--moe-shared-expert-intermediate-size", "of the shared expert", OF_EXPERTS),
    Size("--mamba-state-dim", "states of a value", OF_MAMBA, 128),
    Size("--mamba-head-dim", "values of a head", OF_MAMBA, 64),
    Size("--mamba-num-groups", "groups of heads", OF_MAMBA, 8),
    Size("--mamba-num-heads", "heads (default: 2 times hidden over --mamba-head-dim)", OF_MAMBA),
    Size("--linear-conv-kernel-dim", "width of the convolution", OF_DELTA, 4),
    Size("--linear-key-head-dim", "values of a key", OF_DELTA, 128),
    Size("--linear-value-head-dim", "values of a value", OF_DELTA, 128),
    Size("--linear-num-key-heads", "heads of queries and keys", OF_DELTA, 16),
    Size("--linear-num-value-heads", "heads of values", OF_DELTA, 32),
)
SWITCHES = (
    Size("--group-query-attention", "fewer heads of keys and values", "*"),
    Size("--attention-output-gate", "attention has a gate", "*"),
    Size("--add-qkv-bias", "biases of queries, keys and values", "*"),
    Size("--swiglu", "blocks are gated", "-E"),
    Size("--moe-shared-expert-gate", "the shared expert has a gate", OF_EXPERTS),
    Size("--disable-bias-linear", "no biases"),
    Size("--untie-embeddings-and-output-weights", "the output has a matrix of its own"),
)
MOST = 1 << 24


def add_arguments(group: Any) -> None:
    """Add the pattern and the sizes."""
    group.add_argument(
        FLAG,
        metavar="PATTERN",
        help="the layers, such as '*E*E|M-G-': a symbol "
        "for each; one that begins with - is typed behind =",
    )
    for row in SIZES:
        default = "" if row.default is None else f" (default: {row.default})"
        group.add_argument(row.flag, type=int, metavar="N", help=_of(row) + default)
    for row in SWITCHES:
        group.add_argument(row.flag, action="store_true", help=_of(row))
    group.add_argument(
        "--ep-experts-per-layer", metavar="N*LAYERS,...", help="of E: experts of each layer"
    )
    group.add_argument(
        "--normalization",
        choices=("LayerNorm", "RMSNorm"),
        default="LayerNorm",
        help="kind of the norms (default: LayerNorm)",
    )
    group.add_argument(
        "--position-embedding-type",
        choices=("learned_absolute", "rope", "yarn", "none"),
        default="learned_absolute",
        help="learned ones are parameters (default: learned_absolute)",
    )


def _of(row: Size) -> str:
    return f"of {' and '.join(row.symbols)}: {row.summary}" if row.symbols else row.summary


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _acts(symbols: str) -> Callable[[argparse.Namespace], bool]:
    """Return whether a pattern has one of the layers; one that is refused has them all."""

    def found(args: argparse.Namespace) -> bool:
        pattern = args.hybrid_layer_pattern
        return pattern is None or any(symbol in pattern for symbol in symbols)

    return found


NEEDS = (
    Need(
        " ".join(row.flag for row in (*SIZES, *SWITCHES))
        + " --ep-experts-per-layer --normalization --position-embedding-type",
        lambda args: args.hybrid_layer_pattern is not None,
        "{flag} is a size of a HybridModel, and there is no pattern of one; use "
        "--hybrid-layer-pattern '*E*E'",
    ),
    Need(
        "--hybrid-layer-pattern",
        lambda args: args.preset is None,
        "{flag} and --preset {args.preset} are two models; use one of them",
    ),
    *(
        Need(
            row.flag,
            _acts(row.symbols),
            f"{{flag}} is for {' and '.join(row.symbols)}, which --hybrid-layer-pattern "
            "{args.hybrid_layer_pattern} does not have; use it without {flag}",
        )
        for row in (*SIZES, *SWITCHES, Size("--ep-experts-per-layer", "", OF_EXPERTS))
        if row.symbols
    ),
    Need(
        "--num-query-groups",
        lambda args: args.group_query_attention,
        "{flag} is read by Megatron beside --group-query-attention alone; use both",
    ),
    Need(
        "--max-position-embeddings",
        lambda args: args.position_embedding_type == "learned_absolute",
        "{flag} is for learned positions, and --position-embedding-type is "
        "{args.position_embedding_type}; use it without {flag}",
    ),
    Need(
        "--moe-shared-expert-gate",
        lambda args: args.moe_shared_expert_intermediate_size is not None,
        "{flag} needs a shared expert; use --moe-shared-expert-intermediate-size N with it",
    ),
    Need(
        "--add-qkv-bias",
        lambda args: args.disable_bias_linear,
        "{flag} adds biases that linear layers have already; use --disable-bias-linear with it",
    ),
    Need(
        "--ffn-hidden-size",
        lambda args: (
            args.moe_ffn_hidden_size is None
            or args.hybrid_layer_pattern is None
            or "-" in args.hybrid_layer_pattern
        ),
        "{flag} is for dense blocks, and --moe-ffn-hidden-size says what experts have; use one of "
        "the two",
    ),
    Need(
        "--ep --etp --dispatch-dedup",
        lambda args: args.hybrid_layer_pattern is None or "E" in args.hybrid_layer_pattern,
        "{flag} is for experts, and --hybrid-layer-pattern {args.hybrid_layer_pattern} has no E; "
        "use --tp, --pp and --cp without {flag}",
    ),
    Need(
        "--moe-shared-expert-gate",
        lambda args: args.disable_bias_linear,
        "{flag} needs linear layers without bias; use --disable-bias-linear with it",
    ),
)


def read_sizes(args: argparse.Namespace) -> tuple[Pattern, Sizes, tuple[int, ...]]:
    """Return the pattern, the sizes, and the experts of each layer of the decoder (0: none).

    Raises ConfigError for a pattern or a size that Megatron would refuse.
    """
    pattern = parse(args.hybrid_layer_pattern)
    for row in SIZES:
        value = getattr(args, _name(row.flag))
        if value is not None and not 0 < value <= MOST:
            raise ConfigError(
                f"{row.flag} must be from 1 to {MOST}; got {value}; use {row.flag} "
                f"{row.default or 1}"
            )
    for flag, needed in (
        ("--hidden-size", True),
        ("--vocab-size", True),
        ("--seq-length", True),
        ("--num-attention-heads", bool(set("*+") & set(pattern.symbols))),
        ("--num-experts", "E" in pattern.symbols),
        ("--max-position-embeddings", args.position_embedding_type == "learned_absolute"),
    ):
        if needed and getattr(args, _name(flag)) is None:
            raise ConfigError(
                f"{FLAG} {shown(pattern.text)} needs {flag}; use the one of your training run"
                + (", or --position-embedding-type rope" if "position" in flag else "")
            )
    sizes = _sizes(args)
    _check(pattern, sizes)
    return pattern, sizes, _experts(args, pattern, sizes)


def _sizes(args: argparse.Namespace) -> Sizes:
    given = {_name(row.flag): getattr(args, _name(row.flag)) for row in SIZES}
    said = {_name(row.flag): row.default for row in SIZES} | {
        name: value for name, value in given.items() if value is not None
    }
    hidden, heads = args.hidden_size, args.num_attention_heads or 1
    padding = said.pop("make_vocab_size_divisible_by") * max(1, args.tp)
    ffn = said["ffn_hidden_size"] or (
        max(64, hidden * 8 // 3 // 64 * 64) if args.swiglu else 4 * hidden
    )
    learned = args.position_embedding_type == "learned_absolute"
    fresh = {
        "num_attention_heads": heads,
        "num_query_groups": said["num_query_groups"]
        or (1 if args.group_query_attention else heads),
        "kv_channels": said["kv_channels"] or max(1, hidden // heads),
        "ffn_hidden_size": ffn,
        "moe_ffn_hidden_size": said["moe_ffn_hidden_size"] or ffn,
        "moe_shared_expert_intermediate_size": said["moe_shared_expert_intermediate_size"] or 0,
        "mamba_num_heads": said["mamba_num_heads"] or 2 * hidden // said["mamba_head_dim"],
    }
    for name in ("num_experts", "max_position_embeddings", "vocab_size"):
        said.pop(name)
    return Sizes(
        **(said | fresh),
        vocab=-(-args.vocab_size // padding) * padding,
        attention_output_gate=args.attention_output_gate,
        moe_shared_expert_gate=args.moe_shared_expert_gate,
        swiglu=args.swiglu,
        bias=not args.disable_bias_linear,
        qkv_bias=args.add_qkv_bias,
        norm=hidden * (1 if args.normalization == "RMSNorm" else 2),
        positions=args.max_position_embeddings if learned else 0,
        tied=not args.untie_embeddings_and_output_weights,
    )


def _check(pattern: Pattern, sizes: Sizes) -> None:
    """Raise ConfigError for sizes that Megatron's layers cannot have."""
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    rules = (
        ("*", heads % sizes.num_query_groups,
         f"--num-query-groups ({sizes.num_query_groups}) must divide the {heads} attention heads"),
        ("*", hidden % heads and sizes.kv_channels == max(1, hidden // heads),
         f"--hidden-size ({hidden}) is no multiple of --num-attention-heads ({heads}), which needs "
         "--kv-channels"),
        ("M", 2 * hidden % sizes.mamba_head_dim and sizes.mamba_num_heads * sizes.mamba_head_dim
         == 2 * hidden // sizes.mamba_head_dim * sizes.mamba_head_dim,
         f"twice --hidden-size ({hidden}) is no multiple of --mamba-head-dim "
         f"({sizes.mamba_head_dim}), which needs --mamba-num-heads"),
        ("M", sizes.mamba_num_heads % sizes.mamba_num_groups or not sizes.mamba_num_heads,
         f"--mamba-num-groups ({sizes.mamba_num_groups}) must divide the {sizes.mamba_num_heads} "
         "Mamba heads"),
        ("G", sizes.linear_num_value_heads % sizes.linear_num_key_heads,
         f"--linear-num-key-heads ({sizes.linear_num_key_heads}) must divide "
         f"--linear-num-value-heads ({sizes.linear_num_value_heads})"),
    )  # fmt: skip
    for symbol, broken, sentence in rules:
        if symbol in pattern.symbols and broken:
            raise ConfigError(f"{sentence}; use the sizes of your training run")


def _experts(args: argparse.Namespace, pattern: Pattern, sizes: Sizes) -> tuple[int, ...]:
    places = [symbol == "E" for symbol in pattern.decoder]
    if not any(places):
        return (0,) * len(places)
    most = args.num_experts
    counts = [most] * sum(places)
    if args.ep_experts_per_layer is not None:
        counts = _pyramid(args.ep_experts_per_layer)
        if len(counts) != sum(places) or max(counts) != most:
            raise ConfigError(
                f"--ep-experts-per-layer must have one number for each E ({sum(places)}) with "
                f"--num-experts ({most}) the largest; got {shown(args.ep_experts_per_layer)}; use "
                f"--ep-experts-per-layer {most}*{sum(places)}"
            )
    if most > MOST_EXPERTS:
        raise ConfigError(f"--num-experts must be at most {MOST_EXPERTS}; got {most}; use fewer")
    if sizes.moe_router_topk > min(counts):
        raise ConfigError(
            f"--moe-router-topk ({sizes.moe_router_topk}) must be at most the {min(counts)} "
            f"experts of a layer; use --moe-router-topk {min(counts)}"
        )
    numbers = iter(counts)
    return tuple(next(numbers) if place else 0 for place in places)


def _pyramid(text: str) -> list[int]:
    from ep_plugin.megatron.arguments.parser import experts_per_layer

    try:
        return list(experts_per_layer(text))
    except WrongWord as error:
        raise of_flag("--ep-experts-per-layer", str(error)) from error
