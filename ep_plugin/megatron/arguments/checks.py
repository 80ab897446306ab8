"""Megatron's arguments: what ours mean, and every check that needs no communication."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch

from ep_plugin.checkpoint.scopes import SCOPES
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.layer_pattern import check_hybrid, pattern_of
from ep_plugin.megatron.arguments.table import (
    BY_NAME,
    KINDS,
    TABLE,
    TYPED,
    WITHOUT_EXPERTS,
    automatic,
    expert_ranks,
    feeding,
)
from ep_plugin.megatron.arguments.theirs import check, several
from ep_plugin.megatron.arguments.together import check_together
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.seams import touchpoints
from ep_plugin.megatron.settings import (
    moe_config,
    moe_pattern,
    overlap_schedule,
    ranks_per_node,
    routing_config,
)
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.experts.fits import check_capturable, check_sizes
from ep_plugin.moe.parallel import ParallelConfig, check_experts_over_ranks, degree
from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.moe.rules import own, said
from ep_plugin.moe.schedule.chunked import check_ranks
from ep_plugin.registry import available, resolve


def take_typed(args: Any) -> Mapping[str, str]:
    """Return the flags that the command line had, and their arguments; forget them in `args`.

    Checkpoints keep `args`.

    Arguments that no command line made say so by what they hold.
    """
    typed = vars(args).pop(TYPED, None)
    if typed is not None:
        return dict(typed)
    ours = (row for row in TABLE if row.twin is None)
    return {row.flag: row.dest for row in ours if getattr(args, row.dest, None) != row.default}


def settings_from_args(args: Any) -> EdgeSettings:
    """Return the `--ep-*` settings; raises ConfigError for a name that is no option.

    What Megatron acts on itself is written into its arguments: the type of the load-balancing loss
    (it starts a global one anew after each step), pre-softmax (it refuses top-1 without), and the
    schedule that `--ep-overlap two_batch` names.
    """
    for row in KINDS:
        _check_option(row.flag, str(row.kind), getattr(args, row.dest))
    own = {row.name: getattr(args, row.dest) for row in feeding("routing") if row.twin is None}
    routing = {name: value for name, value in own.items() if value is not None}
    if "aux_loss_scope" in routing:
        _choose_scope(args, routing["aux_loss_scope"])
    _write_balancing(args, routing)
    if routing.get("normalize") in ("none", "after_drop"):
        args.moe_router_pre_softmax = True
    elif "normalize" in routing and args.moe_router_pre_softmax:
        raise ConfigError(
            f"--ep-normalize ({routing['normalize']}) and --moe-router-pre-softmax contradict each "
            "other; leave one of them out"
        )
    if args.ep_overlap == "two_batch" and args.expert_model_parallel_size > 1:  # else it is idle
        args.overlap_moe_expert_parallel_comm = True
        if args.moe_token_dispatcher_type == "allgather":  # Megatron's default, which is not ours
            args.moe_token_dispatcher_type = "alltoall"
    if args.ep_deterministic is False and args.deterministic_mode:
        raise ConfigError(
            "--ep-deterministic (off) and --deterministic-mode contradict each other; leave one of "
            "them out"
        )
    names = {f.name for f in fields(EdgeSettings)} - {"routing", "metrics", "tokens"}
    return EdgeSettings(
        routing=routing,
        metrics=bool(args.tensorboard_dir or args.wandb_project),
        tokens=tokens_of_a_rank(args),
        **{row.name: getattr(args, row.dest) for row in TABLE if row.name in names},
    )


def tokens_of_a_rank(args: Any) -> int | None:
    """Return the tokens of a micro-batch that one rank routes; None where it is not said."""
    if not args.seq_length or not args.micro_batch_size:
        return None
    shares = args.tensor_model_parallel_size if args.sequence_parallel else 1
    tokens: int = args.seq_length * args.micro_batch_size
    ranks: int = args.context_parallel_size * shares
    return max(1, tokens // ranks)


def _choose_scope(args: Any, scope: str) -> None:
    """Write Megatron's type of the load-balancing loss; raises ConfigError for two that differ."""
    theirs = args.moe_router_load_balancing_type
    if theirs not in ("aux_loss", ["aux_loss"], SCOPES[scope], [SCOPES[scope]]):
        raise ConfigError(
            f"--ep-aux-loss-scope ({scope}) and --moe-router-load-balancing-type ({theirs}) "
            "contradict each other; leave one of them out"
        )
    args.moe_router_load_balancing_type = SCOPES[scope]


def _write_balancing(args: Any, routing: dict[str, Any]) -> None:
    """Write what else of ours balances into Megatron's type, whose counts and bias it keeps."""
    named = several(args.moe_router_load_balancing_type)
    main = named[0]
    coefficient = several(args.moe_aux_loss_coeff)[0]
    further = routing.get("further_losses", ())
    types = [main, *(SCOPES[scope] for scope, _ in further)]
    if further and named[1:] and named != types:
        raise ConfigError(
            f"--ep-further-losses ({','.join(f'{scope}:{share:g}' for scope, share in further)}) "
            f"and --moe-router-load-balancing-type ({' '.join(named)}) both name further losses; "
            "leave one of them out"
        )
    if further and coefficient and len({*types}) == len(types):  # others are refused
        args.moe_router_load_balancing_type = types
        args.moe_aux_loss_coeff = [coefficient, *(share for _, share in further)]
    if routing.get("quantile_balancing"):
        args.moe_router_load_balancing_type = ["quantile_balancing"]
    if "quantile_ema" in routing:
        args.moe_router_quantile_balancing_ema = routing["quantile_ema"]


def _check_option(flag: str, kind: str, name: str) -> None:
    if name in automatic(kind):
        return
    if "." not in name and name not in available(kind):
        legal = ", ".join((*automatic(kind), *available(kind)))
        raise ConfigError(f"{flag} must be one of {legal}; got {name!r}")
    resolve(kind, name)


def check_typed(args: Any, typed: Collection[str]) -> None:
    """Raise ConfigError for a flag of ours that would do nothing in this run."""
    for row in TABLE:
        if row.flag not in typed:
            continue
        value = getattr(args, row.dest)
        if args.num_experts is None and row.group not in ("checkpoint", "run"):
            if row.flag not in WITHOUT_EXPERTS:
                raise ConfigError(
                    f"{row.flag} ({said(value)}) is about experts, and this model has none; use "
                    "--num-experts 8"
                )
            continue
        for need in row.needs:
            asked = value in need.values if need.values else value != row.field_default
            if asked and not need.when(args):
                raise ConfigError(f"{row.flag} ({said(value)}) {need.sentence}")
    check_together(args, typed)


_OF_ONE_RANK = ("local", "serial", False)  # what is done there anyway


def idle(args: Any, typed: Collection[str]) -> list[str]:
    """Return the flags that were typed and do nothing at this expert-parallel size."""
    if args.num_experts is None:
        return []
    return [*_idle_at_one_rank(args, typed), *_never_full(args, typed)]


def _never_full(args: Any, typed: Collection[str]) -> list[str]:
    """Return the flag of a rank's capacity where no skew fills it.

    At worst a rank gets the rows of all that share experts, `degree` times those in balance: ranks
    of etp share them too, and all get as many.
    """
    row = BY_NAME["rank_capacity"]
    factor = getattr(args, row.dest)
    if row.flag not in typed or factor is None:
        return []
    sizes = getattr(args, "ep_experts_per_layer", None) or (args.num_experts,)
    most = max(degree(args.expert_model_parallel_size, experts) for experts in sizes)
    return [row.flag] if factor >= most else []


def _idle_at_one_rank(args: Any, typed: Collection[str]) -> list[str]:
    if expert_ranks(args) > 1:
        return []
    modules = {"dispatch": args.ep_dispatcher, "overlap": args.ep_overlap}
    return [
        row.flag
        for row in TABLE
        if row.flag in typed and row.idle_at_one_rank and not own(modules[row.group])
        if getattr(args, row.dest) not in (row.field_default, *_OF_ONE_RANK)
    ]


def check_block(args: Any, settings: EdgeSettings) -> None:
    """Raise ConfigError for a block that validated arguments cannot make, before it is built."""
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    device = torch.device("cpu" if cpu_mode.wanted() else "cuda")
    layers = (layer for layer, is_moe in enumerate(moe_pattern(args), start=1) if is_moe)
    for config in {moe_config(args, settings, layer) for layer in layers}:  # most are alike
        check_sizes(config, etp, device)
        check_capturable(config, etp, device, args.params_dtype)
        if config.overlap == "chunked":
            tp = args.tensor_model_parallel_size
            ranks = degree(args.expert_model_parallel_size, config.num_experts) * etp
            check_ranks(config, ranks - 1, tp if tp > 1 and not args.sequence_parallel else None)
        if config.gemm != "auto":
            hidden, ffn = config.hidden_size, config.ffn_hidden_size // etp
            build = resolve("gemm", config.gemm)
            build(hidden, ffn * (2 if config.gated else 1), args.params_dtype)
            build(ffn, hidden, args.params_dtype)


def check_arguments(args: Any, settings: EdgeSettings) -> None:
    """Raise ConfigError for a layout or a pattern that cannot work, before Megatron looks at it."""
    _check_heads(args)
    parallel = ParallelConfig(
        world_size=args.world_size,
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
    )
    check_hybrid(args, two_batch=_two_batch(args, settings))
    if args.num_experts is None:
        if parallel.ep > 1:
            raise ConfigError(
                f"--expert-model-parallel-size ({parallel.ep}) needs experts; use "
                f"--num-experts {parallel.ep}"
            )
        return
    check(args, settings)
    pattern = args.moe_layer_freq
    if isinstance(pattern, int) and pattern < 1:
        raise ConfigError(
            f"--moe-layer-freq must be at least 1, for every layer; got {pattern}; use "
            "--moe-layer-freq 1"
        )
    if isinstance(pattern, list) and len(pattern) == args.num_layers and not any(pattern):
        raise ConfigError(
            f"--moe-layer-freq ({pattern}) leaves no layer for the experts of --num-experts "
            f"({args.num_experts}); use --moe-layer-freq 1, or leave out --num-experts"
        )
    if isinstance(pattern, list) and len(pattern) != args.num_layers:
        example = ([0, 1] * args.num_layers)[: args.num_layers]
        raise ConfigError(
            f"--moe-layer-freq must have one entry per layer, --num-layers ({args.num_layers}); "
            f"got {len(pattern)} entries: {pattern}; use "
            f"--moe-layer-freq '{example}'"
        )
    ranks_per_node(settings)
    if overlap_schedule(args, settings) == "two_batch" and expert_ranks(args) > 1:
        _check_combined_schedule(args)
    routing = routing_config(args, settings)
    _check_router(args, routing)
    layers = _experts(args, settings)
    check_experts_over_ranks(args.num_experts, parallel.ep)
    if any(degree(parallel.ep, number) < parallel.ep for number in layers):
        _check_copies(args)
    for num_experts in layers:
        MoEConfig(
            hidden_size=1,
            ffn_hidden_size=1,
            num_experts=num_experts,
            routing=routing,
            router=settings.router,
        )
    if settings.shared_expert == "learned" and not args.moe_shared_expert_intermediate_size:
        raise ConfigError(
            "--ep-shared-expert (learned) weighs a shared expert, and there is none; use "
            f"--moe-shared-expert-intermediate-size {args.moe_ffn_hidden_size or 2048}"
        )


def _two_batch(args: Any, settings: EdgeSettings) -> bool:
    return args.num_experts is not None and overlap_schedule(args, settings) == "two_batch"


def _check_heads(args: Any) -> None:
    """Raise ConfigError, with a degree that goes, unless tensor parallelism divides the heads."""
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    if heads is None or tp < 1 or heads % tp == 0:
        return
    others = args.context_parallel_size * args.pipeline_model_parallel_size
    legal = [n for n in range(min(tp, heads), 0, -1) if heads % n == 0]
    use = next((n for n in legal if args.world_size % (n * others) == 0), legal[0])
    raise ConfigError(
        f"--tensor-model-parallel-size ({tp}) must divide --num-attention-heads ({heads}); use "
        f"--tensor-model-parallel-size {use}"
    )


def _experts(args: Any, settings: EdgeSettings) -> tuple[int, ...]:
    """Return the numbers of experts that layers have."""
    per_layer = settings.experts_per_layer
    if per_layer is None:
        return (args.num_experts,)
    num_moe_layers = sum(moe_pattern(args))
    if pattern_of(args) is None and not isinstance(args.moe_layer_freq, list):
        raise ConfigError(
            f"--ep-experts-per-layer needs --moe-layer-freq as a list, so that Megatron saves each "
            f"layer under its own name; got {args.moe_layer_freq}; use "
            f"--moe-layer-freq '[1]*{args.num_layers}'"
        )
    if len(per_layer) != num_moe_layers or max(per_layer) != args.num_experts:
        raise ConfigError(
            f"--ep-experts-per-layer must have one entry per MoE layer ({num_moe_layers}) with "
            f"--num-experts ({args.num_experts}) the largest; got {per_layer}; use "
            f"--ep-experts-per-layer {args.num_experts}*{num_moe_layers}"
        )
    return per_layer


def _check_copies(args: Any) -> None:
    """Raise ConfigError for what cannot have an expert on several ranks of its group."""
    rules = (
        ("--log-params-norm", args.log_params_norm, "leave it out"),
        ("--ckpt-format torch", args.ckpt_format == "torch", "use --ckpt-format torch_dist"),
    )
    for flag, given, use in rules:
        if given:
            raise ConfigError(
                f"{flag} takes each expert to be on one rank of expert parallelism, and "
                f"--ep-experts-per-layer has layers whose experts do not divide by "
                f"--expert-model-parallel-size ({args.expert_model_parallel_size}), so that "
                f"several ranks hold them; {use}"
            )


def spread(args: Any, settings: EdgeSettings) -> str | None:
    """Return over how many ranks each number of experts is spread; None where it is all of them."""
    ep, layers = args.expert_model_parallel_size, sorted(set(_experts(args, settings)))
    degrees = {number: degree(ep, number) for number in layers}
    if min(degrees.values()) == ep:
        return None
    parts = (
        f"{number} experts on {ranks}" + (f" ({ep // ranks} copies of each)" if ranks < ep else "")
        for number, ranks in degrees.items()
    )
    return f"expert parallelism of {ep} ranks, by a layer's experts: {', '.join(parts)}"


def _check_router(args: Any, routing: RoutingConfig) -> None:
    """Raise ConfigError for a router of ours that Megatron's own configuration refuses."""
    if routing.score_function != "softmax":
        return
    if routing.expert_bias:
        raise ConfigError(
            "<expert_bias> is added to sigmoid scores alone in Megatron; use "
            "<score_function=sigmoid>"
        )
    if routing.topk == 1 and not args.moe_router_pre_softmax:
        raise ConfigError(
            "<topk> (1) with softmax over the chosen alone makes every weight 1, which Megatron "
            "refuses; use <normalize=none>"
        )


def _check_combined_schedule(args: Any) -> None:
    """Raise ConfigError where Megatron's schedule for two micro-batches is not ours to run, and
    for what it does not run with."""
    version = touchpoints.installed_version()
    if not touchpoints.release_for(version).COMBINED_1F1B:
        raise ConfigError(
            "--overlap-moe-expert-parallel-comm is tested from megatron-core 0.19 on; got "
            f"{version}; use --ep-overlap chunked"
        )
    ours = args.ep_overlap == "two_batch"
    flag = "--ep-overlap (two_batch)" if ours else "--overlap-moe-expert-parallel-comm"
    stages = (
        *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
        *("pipeline_model_parallel_layout", "virtual_pipeline_model_parallel_size"),
    )
    one_stage = not any(getattr(args, name, None) for name in stages)
    for refused, sentence in (
        (
            args.expert_model_parallel_size == 1,
            "runs experts of other ranks, and --expert-model-parallel-size is 1; use --ep-overlap "
            "chunked",
        ),
        (
            args.moe_token_dispatcher_type == "allgather",
            "needs another --moe-token-dispatcher-type; use --moe-token-dispatcher-type alltoall",
        ),
        (not (args.bf16 or args.fp16), "needs bf16 or fp16; use --bf16 with it"),
        (
            args.recompute_granularity == "full",
            "does not go with --recompute-granularity full; use --recompute-granularity selective, "
            "or --ep-overlap chunked",
        ),
        (
            "moe" in (args.recompute_modules or ()),
            "does not go with moe among --recompute-modules; leave it out, or use --ep-overlap "
            "chunked",
        ),
        (
            args.pipeline_model_parallel_size > 1 and one_stage,
            "needs virtual stages beside --pipeline-model-parallel-size "
            f"({args.pipeline_model_parallel_size}); use --num-virtual-stages-per-pipeline-rank 2",
        ),
    ):
        if refused:
            raise ConfigError(f"{flag} {sentence}")
