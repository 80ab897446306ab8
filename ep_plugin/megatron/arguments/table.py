"""The plugin's own flags, one row each: parser, settings, refusals, printed flags, page, digest.

A row that feeds a field takes its type, legal values and default from there. To add an option, add
the field (with its rule in `moe/rules.py`, when it does not always act) and its row here.
Imports neither torch nor Megatron.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ep_plugin.checkpoint.moe_layers import has_dense_layer
from ep_plugin.checkpoint.scopes import SCOPES
from ep_plugin.megatron.arguments.captures import captures_blocks
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.moe.rules import IDLE_AT_ONE_RANK

Group = Literal[
    "routing", "capacity", "losses", "experts", "fp8", "dispatch", "overlap", "checkpoint", "run"
]
RESHARDABLE = ("fully_reshardable", "dp_reshardable")
# On the parsed arguments until `checks.take_typed` reads it: flags of the user's command line, and
# the argument of each.
TYPED = "ep_typed"
HOMES = {"routing": RoutingConfig, "moe": MoEConfig, "edge": EdgeSettings}


@dataclass(frozen=True)
class Need:
    """An own flag acts only `when`; else it is refused: the flag, its value, then `sentence`."""

    when: Callable[[Any], bool]  # of Megatron's arguments
    sentence: str
    values: tuple[Any, ...] = ()  # that need it; (): all but the default


@dataclass(frozen=True)
class Argument:
    """One flag of ours."""

    flag: str
    group: Group
    help: str
    feeds: str | None = None  # "routing.FIELD", "moe.FIELD" or "edge.FIELD"
    twin: str | None = None  # Megatron's argument of the same meaning: one destination, last wins
    cousin: str | None = None  # a flag of Megatron's that also sets the field, in other words
    cousin_values: Mapping[str, str] = field(default_factory=dict)  # ours -> theirs; "": bare
    choices: tuple[str, ...] | None = None  # where no field says
    default: Any = None
    needs: tuple[Need, ...] = ()  # those of the edge; those of the field stand in moe/rules.py
    kind: str | None = None  # an option of this choice of the registry
    alike: bool = True  # must be equal on all ranks
    comparable: bool = True  # `ep-plugin parity` keeps it

    @property
    def name(self) -> str:
        """The flag without its prefix, as a field is named: `min_capacity`."""
        return self.flag.removeprefix("--ep-").replace("-", "_")

    @property
    def twin_flag(self) -> str | None:
        """How Megatron's argument of the same meaning is typed."""
        return None if self.twin is None else f"--{self.twin.replace('_', '-')}"

    @property
    def usual_flag(self) -> str:
        """How it is typed by who knows Megatron: its flag where there is one."""
        return self.twin_flag or self.flag

    @property
    def dest(self) -> str:
        """The attribute of the parsed arguments, and of those in a checkpoint."""
        return self.twin or f"ep_{self.name}"

    @property
    def idle_at_one_rank(self) -> bool:
        """Whether it does nothing, and is legal, where one rank has all experts."""
        return f"moe.{self.name}" in IDLE_AT_ONE_RANK or self.name == "ranks_per_node"

    @cached_property
    def hint(self) -> Any:
        """The type of the field it feeds, without None."""
        if self.feeds is None:
            number = int if isinstance(self.default, int) and self.default else bool
            return Literal[self.choices] if self.choices else number
        part, _, name = self.feeds.partition(".")
        hint = get_type_hints(HOMES[part])[name]
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0] if type(None) in get_args(hint) and len(kinds) == 1 else hint

    @property
    def legal(self) -> tuple[str, ...] | None:
        """The values to choose from; None for a number, a name or a switch."""
        return get_args(self.hint) if get_origin(self.hint) is Literal else None

    @property
    def field_default(self) -> Any:
        """The value of the field when the flag is not given."""
        if self.feeds is None:
            return self.default
        part, _, name = self.feeds.partition(".")
        return next(f.default for f in fields(HOMES[part]) if f.name == name)


def _routing(name: str, group: Group, help: str, twin: str | None = None, **more: Any) -> Argument:
    flag = f"--ep-{name.replace('_', '-')}"
    return Argument(flag, group, help, f"routing.{name}", twin, **more)


def _block(name: str, group: Group, help: str, **more: Any) -> Argument:
    return Argument(f"--ep-{name.replace('_', '-')}", group, help, f"moe.{name}", **more)


def _edge(name: str, group: Group, help: str, **more: Any) -> Argument:
    return Argument(f"--ep-{name.replace('_', '-')}", group, help, f"edge.{name}", **more)


_SAVES = Need(
    lambda args: bool(args.save), "is about checkpoints, and none is saved; use --save DIR"
)
_DENSE_BLOCKS = Need(
    lambda args: (
        args.num_experts is None
        or args.ep_expert_activation is None
        or bool(args.moe_shared_expert_intermediate_size)
        or has_dense_layer(args)
    ),
    "is the activation of dense blocks and shared experts, and there are none; use "
    "--ep-expert-activation alone",
)


_ONE_RANK = Need(
    lambda args: expert_ranks(args) == 1,
    "is for experts that are all on one rank, and they are spread; use --ep-dispatcher alltoall or "
    "--expert-model-parallel-size 1 with --expert-tensor-parallel-size 1",
    values=("local",),
)
_SHARED_EXPERT = Need(
    lambda args: bool(args.moe_shared_expert_intermediate_size),
    "computes a shared expert while tokens travel, and there is none; use "
    "--moe-shared-expert-intermediate-size 2048 or --ep-overlap chunked",
    values=("shared_expert",),
)


_QUANTILES = Need(
    lambda args: hasattr(args, "moe_router_quantile_balancing_ema"),
    "needs megatron-core 0.19, which moves the bias after each step; use "
    "--moe-router-enable-expert-bias with --moe-router-score-function sigmoid",
)


_TEACHER = Need(
    lambda args: args.ep_teacher is not None,
    "is about a teacher, and there is none; use --ep-teacher CKPT",
)
_TAUGHT = (
    Need(
        lambda args: args.pipeline_model_parallel_size == 1,
        "needs a student on one pipeline stage, whose ranks have its logits; use "
        "--pipeline-model-parallel-size 1",
    ),
    Need(
        lambda args: args.context_parallel_size == 1,
        "needs whole sequences on each rank; use --context-parallel-size 1",
    ),
    Need(
        lambda args: (
            not getattr(args, "overlap_moe_expert_parallel_comm", False)
            and args.ep_overlap != "two_batch"
        ),
        "enters the student's forward, which the schedule for two micro-batches takes apart; use "
        "--ep-overlap serial, and leave --overlap-moe-expert-parallel-comm out",
    ),
    Need(
        lambda args: not captures_blocks(args),
        "is asked anew in each micro-batch: a graph of the iteration would keep what was asked "
        "first, and graphs of layers have not been tried beside it; use --cuda-graph-impl none",
    ),
    Need(
        lambda args: (
            not getattr(args, "cross_entropy_loss_fusion", False)
            or getattr(args, "cross_entropy_fusion_impl", "native") in ("native", "te")
        ),
        "needs the student's logits, which a linear cross entropy never has; use "
        "--cross-entropy-fusion-impl native",
    ),
    Need(
        lambda args: (
            getattr(args, "logits_load_dir", None) is None
            and getattr(args, "export_kd_teacher_load", None) is None
        ),
        "and Megatron's own distillation would each add a loss of a teacher; use "
        "--ep-teacher alone",
    ),
    Need(
        lambda args: (
            not (
                getattr(args, "use_megatron_fsdp", False) or getattr(args, "use_torch_fsdp2", False)
            )
        ),
        "is not tested beside a student that is sharded by FSDP; use --use-distributed-optimizer",
    ),
)


def expert_ranks(args: Any) -> int:
    """Return ep*etp, the ranks that hold one copy of all experts."""
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return int(args.expert_model_parallel_size * etp)


TABLE: tuple[Argument, ...] = (
    Argument("--ep-preset", "run", "a published system's model and routing: see ep-plugin presets"),
    _edge("router", "routing", "which experts a token goes to", kind="router", default="topk"),
    _edge(
        "dispatcher",
        "dispatch",
        "how rows reach their experts",
        kind="dispatcher",
        default="auto",
        needs=(_ONE_RANK,),
    ),
    _edge(
        "gemm", "experts", "the grouped matrix product of the experts", kind="gemm", default="auto"
    ),
    _edge(
        "overlap",
        "overlap",
        "what is computed while tokens travel",
        kind="overlap",
        default="auto",
        needs=(_SHARED_EXPERT,),
    ),
    # routing, in the order of RoutingConfig
    _routing("topk", "routing", "experts a token goes to", "moe_router_topk"),
    _routing("score_function", "routing", "how logits become scores", "moe_router_score_function"),
    _routing(
        "normalize",
        "routing",
        "divide a token's weights by their sum, before or after dropping",
        cousin="--moe-router-pre-softmax",
        cousin_values={"none": "", "after_drop": ""},
    ),
    _routing(
        "scaling_factor",
        "routing",
        "factor that the weights are multiplied by",
        "moe_router_topk_scaling_factor",
    ),
    _routing(
        "router_dtype",
        "routing",
        "dtype of the logits; default fp32, or --moe-router-dtype",
        cousin="--moe-router-dtype",
    ),
    _routing(
        "router_bias", "routing", "a bias in the router; default: as in the other linear layers"
    ),
    _routing(
        "jitter_eps",
        "routing",
        "multiply the router's input by U[1-eps, 1+eps], in training",
        "moe_input_jitter_eps",
        comparable=False,
    ),
    _routing(
        "noise", "routing", "choose by logits with Gumbel noise, in training", comparable=False
    ),
    _routing("second_expert", "routing", "how the second expert of top-2 is found"),
    _routing(
        "second_threshold",
        "routing",
        "weight below which the second expert is left out, for random and threshold",
    ),
    _routing(
        "num_groups", "routing", "groups of experts, with --ep-group-topk", "moe_router_num_groups"
    ),
    _routing("group_topk", "routing", "groups a token may choose in", "moe_router_group_topk"),
    _routing(
        "group_score_topk",
        "routing",
        "best experts whose scores add up to a group's; default K / groups",
    ),
    _routing(
        "expert_bias",
        "losses",
        "balance by a bias instead of a loss",
        "moe_router_enable_expert_bias",
    ),
    _routing(
        "bias_update_rate", "losses", "step of the expert bias", "moe_router_bias_update_rate"
    ),
    _routing(
        "quantile_balancing",
        "losses",
        "balance by a bias that is a quantile of the logits",
        cousin="--moe-router-load-balancing-type",
        cousin_values={"True": "quantile_balancing"},
        needs=(_QUANTILES,),
    ),
    _routing(
        "quantile_ema",
        "losses",
        "weight of the bias of --ep-quantile-balancing so far in the next one",
        cousin="--moe-router-quantile-balancing-ema",
        needs=(_QUANTILES,),
    ),
    _routing(
        "force_load_balancing",
        "routing",
        "random logits, so that experts are loaded alike: to measure speed, not to train",
        "moe_router_force_load_balancing",
        comparable=False,
    ),
    _routing(
        "capacity_factor",
        "capacity",
        "tokens an expert takes, over its fair share; default: all",
        cousin="--moe-expert-capacity-factor",
    ),
    _routing("eval_capacity_factor", "capacity", "the same factor in evaluation; default: all"),
    _routing("min_capacity", "capacity", "tokens an expert takes at least"),
    _routing("capacity_rounding", "capacity", "how a capacity becomes a whole number"),
    _routing("capacity_counts_topk", "capacity", "whether the fair share is S*K/E or S/E"),
    _routing(
        "drop_policy",
        "capacity",
        "who goes when an expert is full; probs where there is a capacity",
        cousin="--moe-token-drop-policy",
    ),
    _routing("group_tokens", "capacity", "tokens of a routing group; default: all of a rank"),
    _routing(
        "aux_loss_coeff",
        "losses",
        "coefficient of the load-balancing loss",
        "moe_aux_loss_coeff",
    ),
    _routing("aux_loss_counts", "losses", "choices that the load-balancing loss counts"),
    _routing(
        "aux_loss_scope",
        "losses",
        "tokens that the load-balancing loss is taken over",
        cousin="--moe-router-load-balancing-type",
        cousin_values=SCOPES,
    ),
    _routing(
        "further_losses",
        "losses",
        "further load-balancing losses, beside that of --ep-aux-loss-scope",
    ),
    _routing("aux_loss_layers", "losses", "sum or mean of the load-balancing loss over layers"),
    _routing("z_loss_coeff", "losses", "coefficient of the router z-loss", "moe_z_loss_coeff"),
    _routing(
        "force_expert_choice",
        "routing",
        "allow --ep-router expert_choice, which sees later tokens",
    ),
    # the block
    _edge(
        "dense_activation",
        "experts",
        "activation of the dense feed-forward blocks",
        needs=(_DENSE_BLOCKS,),
    ),
    _edge(
        "expert_activation",
        "experts",
        "activation of the experts; default: that of the dense blocks",
    ),
    _block(
        "fp8",
        "fp8",
        "recipe of the experts' products; weights and sums stay as they are",
        comparable=False,
        cousin="--fp8-recipe",
    ),
    _block(
        "fp8_wgrad",
        "fp8",
        "precision of the experts' weight gradients, where --ep-fp8 is not off",
        comparable=False,
    ),
    _block(
        "save",
        "experts",
        "how the experts' pre-activations are kept for the backward",
        comparable=False,
    ),
    _block(
        "rank_capacity",
        "experts",
        "bound the memory of a layer's experts: they compute so many times the rows that a rank "
        "gets in balance, in as many passes as there are rows; default: all rows at once",
        comparable=False,
    ),
    _block(
        "deterministic",
        "run",
        "equal bits in every run: no kernel is chosen by measuring",
        comparable=False,
        cousin="--deterministic-mode",
        cousin_values={"True": ""},
    ),
    _block(
        "dispatch_dtype",
        "dispatch",
        "dtype that tokens travel in; fp8: as the FP8 products read them",
        comparable=False,
    ),
    _block(
        "dispatch_dedup",
        "dispatch",
        "a token travels once to a rank, not once for each expert there",
    ),
    _block("check_splits", "dispatch", "when ranks compare what they send before they send it"),
    _block("comm_sms", "dispatch", "number of SMs that --ep-dispatcher symm_mem copies with"),
    _edge(
        "ranks_per_node",
        "dispatch",
        "ranks that share a node, for --ep-dispatcher hierarchical; default: torchrun's",
        needs=(
            Need(
                lambda args: args.ep_dispatcher == "hierarchical" or "." in args.ep_dispatcher,
                "is for --ep-dispatcher hierarchical; use --ep-dispatcher hierarchical",
            ),
        ),
    ),
    _block(
        "overlap_chunks",
        "overlap",
        "number of parts that the other ranks' tokens come in, for --ep-overlap chunked",
    ),
    _block("shared_expert", "experts", "add the shared expert, or weigh it by a learned softmax"),
    _edge(
        "experts_per_layer",
        "experts",
        "experts of each MoE layer (a pyramid): 4,8,8 or 4*10,8*2; in a GPT beside "
        "--moe-layer-freq as a list, such as '[1]*12'",
    ),
    # checkpoints
    Argument(
        "--ep-optimizer-format",
        "checkpoint",
        "how the distributed optimizer is saved: to be resumed at any layout, or at this one",
        choices=RESHARDABLE,
        default="fully_reshardable",
        needs=(
            _SAVES,
            Need(
                lambda args: not args.no_save_optim,
                "is about the optimizer's state, and --no-save-optim saves none; leave one out",
            ),
            Need(
                lambda args: args.use_distributed_optimizer and args.ckpt_format == "torch_dist",
                "is about the distributed optimizer in --ckpt-format torch_dist; use "
                "--use-distributed-optimizer with --ckpt-format torch_dist",
            ),
            Need(
                lambda args: (
                    args.ep_optimizer_format == "fully_reshardable"
                    or not args.dist_ckpt_optim_fully_reshardable
                ),
                "and --dist-ckpt-optim-fully-reshardable contradict each other; leave one out",
            ),
            Need(
                lambda args: args.num_experts is not None,
                "is for models with experts, and this one has none; use --num-experts 8, or "
                "--dist-ckpt-optim-fully-reshardable",
                values=("fully_reshardable",),
            ),
        ),
    ),
    Argument(
        "--ep-check-save",
        "checkpoint",
        "save nothing that holds nan or inf: the run ends, and goes on from the checkpoint before",
        choices=("on", "off"),
        default="on",
        needs=(_SAVES,),
    ),
    Argument(
        "--ep-audit-save",
        "checkpoint",
        "audit each checkpoint after it is saved, and stop when it is not whole: ep-plugin audit",
        default=False,
        needs=(
            _SAVES,
            Need(
                lambda args: args.ckpt_format == "torch_dist",
                "reads --ckpt-format torch_dist; use --ckpt-format torch_dist",
            ),
        ),
    ),
    Argument(
        "--ep-teacher",
        "run",
        "a checkpoint whose model teaches this one: its distillation loss joins the language loss",
        comparable=False,
        needs=_TAUGHT,
    ),
    Argument(
        "--ep-teacher-layout",
        "run",
        "tensor- and expert-parallel sizes of the teacher, over the same ranks: tp=2,ep=2; those "
        "of the student where not said",
        comparable=False,
        needs=(_TEACHER,),
    ),
    Argument(
        "--ep-distill-temperature",
        "run",
        "temperature of both distributions in the distillation loss",
        default=1.0,
        comparable=False,
        needs=(_TEACHER,),
    ),
    Argument(
        "--ep-distill-weight",
        "run",
        "weight of the distillation loss beside the language loss",
        default=1.0,
        comparable=False,
        needs=(_TEACHER,),
    ),
    Argument(
        "--ep-distill-stop",
        "run",
        "part of the run's samples after which the teacher is gone, above 0 and up to 1",
        default=0.7,
        comparable=False,
        needs=(_TEACHER,),
    ),
    Argument(
        "--ep-watch-ranks",
        "run",
        "seconds without a move after which a run says which rank it waits for; 0: never",
        default=20,
        comparable=False,
        needs=(
            Need(
                lambda args: args.num_experts is not None or args.ep_watch_ranks == 0,
                "is for models with experts, and this one has none; use --num-experts 8",
            ),
        ),
    ),
)
BY_NAME = {row.name: row for row in TABLE}
KINDS = tuple(row for row in TABLE if row.kind is not None)
SWITCHES = (
    "moe_router_enable_expert_bias",
    "moe_router_force_load_balancing",
)  # twins that take no value
# Without --num-experts these still say something; every other flag of ours is refused.
WITHOUT_EXPERTS = ("--ep-preset", "--ep-dense-activation")


def feeding(part: str) -> tuple[Argument, ...]:
    """Return the rows whose fields are of "routing", "moe" or "edge"."""
    return tuple(row for row in TABLE if (row.feeds or "").startswith(f"{part}."))


def automatic(kind: str) -> tuple[str, ...]:
    """Return `auto` for the kinds that have it."""
    return () if kind == "router" else ("auto",)
