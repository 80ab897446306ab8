"""What Megatron builds in place of the dense MLP: ours inside, Megatron's contract outside."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_random_logits,
    get_default_pg_collection,
)
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    sharded_state_dict_default,
)
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.captures import captures_layers
from ep_plugin.megatron.arguments.in_flags import refusal
from ep_plugin.megatron.block import choice, combined
from ep_plugin.megatron.block.adopt_groups import adopt_groups
from ep_plugin.megatron.block.build_shared_expert import build_shared_expert
from ep_plugin.megatron.block.graphs import check_graphs
from ep_plugin.megatron.block.models import row_of, uses
from ep_plugin.megatron.block.parameters import (
    MainGrads,
    are_grouped,
    initialize_experts,
    initialize_replicated,
    set_tags,
    share_values,
)
from ep_plugin.megatron.block.sharded_state import EXTRA_STATE, expert_sharded_state
from ep_plugin.megatron.block.strength import Strength
from ep_plugin.megatron.block.tracking import RoutingTracker
from ep_plugin.megatron.seams.refusal import refuse
from ep_plugin.megatron.settings import EdgeSettings, moe_config, moe_pattern, ranks_per_node
from ep_plugin.moe.interfaces import Routing, set_up_router
from ep_plugin.moe.layer import MoELayer
from ep_plugin.moe.parallel import degree
from ep_plugin.moe.rules import at_one_rank


class EPMoELayer(MegatronMoELayer):  # type: ignore[misc]
    """`ep_plugin.MoELayer` with the names, groups, tags and checkpoint keys of Megatron's MoELayer.

    It is a subclass because Megatron asks `isinstance(mlp, MoELayer)`; nothing else is inherited
    but the fields of BaseMoELayer. `install()` sets the attributes of the class it installs.
    """

    settings = EdgeSettings()
    typed: Collection[str] | None = None  # flags of the command line, where one was parsed
    pattern: str | None = None  # --hybrid-layer-pattern of that command line
    minutes: int | None = None  # its --distributed-timeout-minutes
    tracker: RoutingTracker | None = None
    log_interval = 1  # iterations between two writes of the tracker
    inside_mtp = False  # whether what is built now belongs to a layer of multi-token prediction
    strength = Strength()
    _counted: Tensor | int  # of the tokens that are routed, those that are no padding
    shared: dict[str, Any]
    used = False  # whether flags were parsed for it, or a block built

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        """Build the block. Raises ConfigError for Megatron settings that ours cannot honour."""
        type(self).used = True
        pg_collection = pg_collection if pg_collection is not None else get_default_pg_collection()
        BaseMoELayer.__init__(self, config, layer_number, pg_collection)
        self.is_mtp_layer = is_mtp_layer or self.inside_mtp
        # Without sequence parallelism tensor-parallel ranks hold the same tokens, not other ones.
        shares = pg_collection.tp_cp if config.sequence_parallel else pg_collection.cp
        self.tp_cp_group, self.tp_dp_cp_group = shares, pg_collection.tp_dp_cp
        self.moe_layer_recompute = (
            config.recompute_granularity == "selective" and "moe" in config.recompute_modules
        )
        self._is_built = False
        self._build = partial(self._build_or_refuse, submodules, pg_collection, name)
        if layer_number is not None or self.settings.experts_per_layer is None:
            self._build()

    def _build_or_refuse(self, *block: Any) -> None:
        """Build; where a command line was parsed, a mistake found here ends the run as one there.

        What only a layer with its groups can know is found here, on every rank alike.
        """
        try:
            self._build_block(*block)
        except ConfigError as error:
            if self.typed is None:
                raise
            refuse(refusal(error, self.typed))

    def _build_block(self, submodules: Any, pg_collection: Any, name: str | None) -> None:
        """Make the block and its parameters; layers may differ in experts, by their number."""
        config = self.config
        check_graphs(config, self.settings)
        row = None if self.layer_number is None else row_of(self)
        ours = moe_config(config, self.settings, row)
        groups = adopt_groups(
            *(pg_collection, config.pipeline_model_parallel_size, self.shared),
            ranks_per_node=ranks_per_node(self.settings),
            replicated=not config.sequence_parallel,
            degree=degree(pg_collection.ep.size(), ours.num_experts),
            minutes=self.minutes,
        )
        layer = MoELayer(
            at_one_rank(ours) if groups.ep_etp_size == 1 else ours,
            groups,
            shared_expert=self._shared if self.use_shared_expert else None,
            init_method=None,
            device=_device(config),
            dtype=config.params_dtype,
        )
        if not any(moe_pattern(config)[: (self.layer_number or 1) - 1]):
            choice.say(ours, layer.config, groups)
        layer.place.name = self._place_name()
        # Kept outside the module tree: its children are registered here, under Megatron's names.
        object.__setattr__(self, "layer", layer)
        router: Any = layer.router
        self.router, self.experts, self.coefficient = router, layer.experts, layer.coefficient
        replicated = [part for part in (router, layer.coefficient) if part is not None]
        if config.perform_initialization:
            for part in replicated:
                initialize_replicated(part, config)
            grouped = are_grouped(submodules)
            initialize_experts(layer.experts, config, groups, grouped=grouped)
            share_values(layer.experts, groups)
        set_tags(replicated, layer.experts, config, groups)
        layer.experts.totals = MainGrads(layer.experts)
        set_up_router(router, attach_loss=self._attach_loss, collect_metrics=self.settings.metrics)
        if ours.routing.force_load_balancing:
            router.random_logits = apply_random_logits
        router.register_forward_hook(self._after_routing)
        if self.use_shared_expert:
            self.shared_experts = build_shared_expert(config, submodules, pg_collection, name)
        self.register_load_state_dict_pre_hook(_drop_extra_states)
        self._is_built = True

    def set_layer_number(self, layer_number: int) -> None:
        """Take the number of the layer, from 1; of the whole model, or of its MTP layers."""
        self.layer_number = layer_number
        if self.tracker is not None:
            self.tracker.enter(self)
        if not self._is_built:
            self._build()
        self.layer.place.name = self._place_name()

    def _place_name(self) -> str:
        """Return how a message calls this layer."""
        if self.layer_number is None:
            return ""
        kind = "MTP layer" if self.is_mtp_layer else "layer"
        return f"{kind} {self.layer_number}"

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Return ([S, B, H], no bias) for `hidden_states` [S, B, H].

        `padding_mask` [B, S] is true for padding, which goes to no expert and counts for nothing.
        """
        mask = None
        if padding_mask is not None:
            if self.training and captures_layers(self.config):
                raise ConfigError(
                    "--cuda-graph-impl transformer_engine hands no padding_mask to a captured "
                    "layer; use --cuda-graph-impl none, or give no padding_mask"
                )
            mask = self._mask(padding_mask, hidden_states)
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._compute, False, hidden_states, mask), None
        return self._compute(hidden_states, mask), None

    def _mask(self, padding_mask: Tensor, hidden_states: Tensor) -> Tensor:
        """Return [S, B] bool of `padding_mask` [B, S]; raises ConfigError for another shape.

        Megatron's first stage gives each tensor-parallel rank its part of the sequence, the later
        ones give all of it.
        """
        length, batch = hidden_states.shape[:2]
        tp: Any = self.attn_tp_group
        if self.config.sequence_parallel and padding_mask.shape == (batch, length * tp.size()):
            padding_mask = padding_mask.chunk(tp.size(), dim=1)[tp.rank()]
        if padding_mask.shape != (batch, length):
            raise ConfigError(
                f"padding_mask must be [B, S], here {[batch, length]}, True for padding; got "
                f"{list(padding_mask.shape)}"
            )
        return padding_mask.transpose(0, 1).bool()

    def _compute(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        self._note_counted(hidden_states, padding_mask)
        output: Tensor = self.layer(hidden_states, padding_mask)
        return output

    def route_tokens(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Routing:
        """Route `hidden_states` [S, B, H]; `padding_mask` [S, B] bool."""
        self._note_counted(hidden_states, padding_mask)
        routing: Routing = self.layer.route(hidden_states, padding_mask)
        return routing

    def _note_counted(self, hidden_states: Tensor, padding_mask: Tensor | None) -> None:
        """Keep the number of tokens that are no padding, over all ranks that share a loss."""
        if not self.config.calculate_per_token_loss:
            return
        ranks = self.tp_cp_group.size()
        if padding_mask is None:
            self._counted = hidden_states.shape[0] * hidden_states.shape[1] * ranks
        else:
            self._counted = (~padding_mask).sum()
            if ranks > 1:
                torch.distributed.all_reduce(self._counted, group=self.tp_cp_group)

    # Megatron's combined 1F1B schedule calls these, one by one.
    under_way: combined.UnderWay | None = None
    shared_experts_compute = combined.shared_experts_compute
    route, preprocess = combined.route, combined.preprocess
    dispatch, routed_experts_compute = combined.dispatch, combined.routed_experts_compute
    combine, postprocess = combined.combine, combined.postprocess

    def _shared(self, hidden_states: Tensor) -> Tensor:
        assert self.shared_experts is not None
        output: Tensor | tuple[Tensor, Tensor] = self.shared_experts(hidden_states)
        return output if isinstance(output, Tensor) else output[0] + output[1]  # and its bias

    def _attach_loss(self, carrier: Tensor, loss: Tensor) -> Tensor:
        """Add `loss` [] with the scale of Megatron's main loss; `carrier` has a row per token.

        A layer that a micro-batch passes several times counts once.
        """
        loss = loss / uses(self)
        if self.config.calculate_per_token_loss:
            # finalize_model_grads divides by the global number of tokens; undo it for this loss.
            loss = self.strength.weigh(loss, self._counted)
        attached: Tensor = MoEAuxLossAutoScaler.apply(carrier, loss)
        return attached

    def _after_routing(self, router: Any, inputs: Any, routing: Routing) -> None:
        if self.tracker is None or not (self.training and torch.is_grad_enabled()):
            return
        self.tracker.record(self, routing)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the parameters under the keys of Megatron's own MoE layer."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = {}
        for name in ("router", "coefficient", "shared_experts"):
            module = getattr(self, name)
            if module is not None:
                state |= sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, self.attn_tp_group
                )
        state |= expert_sharded_state(
            self.experts,
            self.layer.groups,
            self.layer.config.num_experts,
            f"{prefix}experts.",
            sharded_offsets,
            metadata,
        )
        return state

    def backward_dw(self, routed_experts: bool = True, shared_experts: bool = False) -> None:
        """Do nothing: weight gradients are computed in the backward, not delayed."""

    def set_for_recompute_pre_mlp_layernorm(self) -> None:
        """Do nothing: a shared expert needs it under fp8 alone, and `theirs.py` refuses that."""


def _device(config: Any) -> torch.device:
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _drop_extra_states(
    module: EPMoELayer, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Forget what `expert_sharded_state` saves for Megatron's sake alone."""
    for key in [k for k in state_dict if k.startswith(f"{prefix}experts.") and EXTRA_STATE in k]:
        del state_dict[key]
