"""The experts of one rank: fc1, activation times routing weight, fc2, on rows sorted by expert.

Shapes: N tokens, H hidden size, F FFN size of this rank, e local experts, R rows of experts.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_plugin.moe.config import Activation, MoEConfig
from ep_plugin.moe.experts import autotune
from ep_plugin.moe.experts.fits import FP8, check_capturable, check_sizes, uses_gemm
from ep_plugin.moe.experts.fused import Bf16, FusedExperts, Keep, Recipe, Totals
from ep_plugin.moe.experts.hopper import ALIGNED
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Dispatched, GroupedGemm
from ep_plugin.moe.rows import ExpertRows, expert_rows, permute, rows_of, unpermute
from ep_plugin.registry import resolve


def gelu_tanh(x: Tensor) -> Tensor:
    """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of any shape.

    Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv:1606.08415), section 2.
    """
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {  # of the gate, if there is one
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


def captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the current stream; False for a CPU `tensor`."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class GroupedLinear(nn.Module):
    """One linear map per local expert: weight [e, out, in], bias [e, out] or None.

    Call the module before its parameters are read, so that forward pre-hooks run. Those of
    Megatron's optimizer wait there until the updated parameters have been gathered.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool,
        gemm: str,
        measures: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.measures = measures  # whether `auto` may choose a backend by timing it
        shape = (num_experts, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype)) if bias else None
        )
        self._gemm: GroupedGemm | None = None  # None: `auto` picks one
        if gemm != "auto":
            self._gemm = resolve("gemm", gemm)(in_features, out_features, self.weight.dtype)
        self._picked: dict[Any, GroupedGemm] = {}

    def pick_gemm(self, num_rows: int) -> GroupedGemm:
        """Return the backend for a call with `num_rows` rows.

        `auto` measures at the first call with rows, and again if the layer moves to another device
        or dtype. Before that, without rows or while a CUDA graph is captured, it cannot measure and
        takes the backend of `autotune.rule`.
        """
        if self._gemm is not None:
            return self._gemm
        weight = self.weight
        where = weight.device, weight.dtype
        if (*where, True) in self._picked:
            return self._picked[*where, True]
        measured = self.measures and num_rows > 0 and not captured(weight)
        if (*where, measured) not in self._picked:
            self._picked[*where, measured] = autotune.pick(weight, num_rows if measured else 0)
        return self._picked[*where, measured]

    def forward(self) -> Tensor:
        """Return the weight [e, out, in]."""
        return self.weight

    def multiply(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return `rows` [R, in] mapped, without bias: [R, out]; `ends` [e] as in `GroupedGemm`."""
        product: Tensor = _GroupedProduct.apply(rows, self.weight, ends, self.pick_gemm(len(rows)))
        return product


class Experts(nn.Module):
    """The local experts as two grouped linear maps; with etp each rank holds a slice of F.

    A gated activation has fc1 rows [gate; up] per expert, as Megatron stores them.
    Raises ConfigError when F does not divide over etp.
    """

    def __init__(
        self,
        config: MoEConfig,
        groups: ExpertGroups,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ffn, etp = config.ffn_hidden_size, groups.etp_size
        like = torch.empty(0, device=device, dtype=dtype)
        check_sizes(config, etp, like.device)
        check_capturable(config, etp, like.device, like.dtype)
        self.num_local_experts = config.num_experts // groups.ep_size
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        self.config = config
        self.fp8, self.uses_gemm = config.fp8 != "off", uses_gemm(config)
        # With FP8, weights are quantised at every call by default. A training loop that wants it
        # once per step sets the first flag to False, and the second to True before the first
        # micro-batch of each step.
        self.weights_change_every_call = True
        self.is_first_microbatch = True
        self._weights8: Any = None
        self._weights8_captured = False
        # Of a call. The layer sets it with each routing; without a layer there is no capacity.
        self.rows_in_balance: int | None = None
        self.totals: Totals | None = None  # set by a training loop with fp32 sums of gradients
        self.etp_size = etp
        shard = ffn // etp

        def linear(in_features: int, out_features: int) -> GroupedLinear:
            return GroupedLinear(
                self.num_local_experts,
                in_features,
                out_features,
                config.bias,
                config.gemm,
                not config.deterministic,
                device,
                dtype,
            )

        self.linear_fc1 = linear(config.hidden_size, shard * (2 if config.gated else 1))
        self.linear_fc2 = linear(shard, config.hidden_size)

    def forward(self, inbox: Dispatched) -> Tensor:
        """Return for each token the sum of its experts' outputs: [N, H], the dtype of the tokens.

        With etp > 1 it is this rank's part of that sum.
        """
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        fc1_weight, fc2_weight = fc1(), fc2()
        saves_less = self.config.save != "bf16" or self.config.rank_capacity is not None
        if fc1.bias is None and (self.fp8 or saves_less or inbox.tokens.is_cuda):
            choices = inbox.expert_ids, inbox.tokens_per_expert
            where = expert_rows(*choices, self.config.activation, inbox.num_rows)
            keep = self.keep()
            recipe = self.recipes(keep.at_once(where.order.shape[0]))(where)
            output: Tensor = FusedExperts.apply(
                *(inbox.tokens, inbox.probs, fc1_weight, fc2_weight),
                *(recipe, keep, self.totals, inbox.tokens8),
            )
            return output
        self._check_capture()
        moves = rows_of(inbox.expert_ids, inbox.tokens_per_expert)
        ends = moves.ends
        probs = inbox.probs.flatten()[moves.order].unsqueeze(1)  # [R, 1]
        expert = torch.searchsorted(ends, torch.arange(len(probs), device=ends.device), right=True)
        expert = expert.clamp(max=self.num_local_experts - 1)  # [R]; any for absent choices
        hidden = fc1.multiply(permute(inbox.tokens, moves), ends)  # [R, F or 2F]
        if fc1.bias is not None:
            hidden = hidden + fc1.bias[expert]
        hidden = (self._activate(hidden) * probs).to(inbox.tokens.dtype)  # [R, F]
        rows = fc2.multiply(hidden, ends)  # [R, H]
        if fc2.bias is not None:
            bias = _ShareOfSum.apply(fc2.bias[expert], self.etp_size)
            rows = rows + (bias * probs).to(rows.dtype)
        return unpermute(rows, moves)

    def keep(self, share: float = 1.0) -> Keep:
        """Return how many rows of a call, or of such a share of one, are computed at a time.

        And what is kept of them: without a backward nothing. A rank with fewer tokens than others
        knows too small a balance; it makes no more passes than one of as many would need.
        """
        save = self.config.save if torch.is_grad_enabled() else "recompute"
        capacity = self.config.rank_capacity
        if capacity is None or self.rows_in_balance is None:
            return Keep(save)
        ranks = self.config.num_experts // self.num_local_experts
        return Keep(save, math.ceil(capacity * share * self.rows_in_balance), capacity / ranks)

    def recipes(self, num_rows: int) -> Callable[[ExpertRows], Recipe]:
        """Return a function that makes the recipe for rows of a call.

        `num_rows` is how many are computed at a time, which `auto` may choose a backend for.
        """
        self._check_capture()
        # Both products go through one backend: where F has no alignment, one that takes its sizes.
        decides = self.linear_fc2 if self.linear_fc2.weight.shape[2] % ALIGNED else self.linear_fc1
        gemm = decides.pick_gemm(num_rows if self.uses_gemm else 0)
        if not self.fp8:
            return lambda rows: Bf16(rows, gemm)
        wgrad8 = self.config.fp8_wgrad == "fp8"
        kind, weights8 = FP8[self.config.fp8][1], self.weights8()
        return lambda rows: kind(rows, gemm, weights8, wgrad8)

    def _check_capture(self) -> None:
        """Raise ConfigError if a CUDA graph is captured and the products cannot be captured."""
        weight = self.linear_fc1.weight
        if captured(weight):
            config = replace(self.config, in_graph=True)
            check_capturable(config, self.etp_size, weight.device, weight.dtype)

    def weights8(self) -> Any:
        """Return the weights in e4m3, quantised again if they may have changed.

        A graph takes none from outside: its replays, or those of an earlier one, make them anew.
        """
        inside = captured(self.linear_fc1.weight)
        outside_only = inside and not self._weights8_captured
        if self._weights8 is None or self.is_first_microbatch or outside_only:
            with torch.no_grad():
                prepare = FP8[self.config.fp8][0].prepare
                self._weights8 = prepare(self.linear_fc1.weight, self.linear_fc2.weight)
            self._weights8_captured = inside
            if self.is_first_microbatch != self.weights_change_every_call:  # setting it takes time
                self.is_first_microbatch = self.weights_change_every_call
        return self._weights8

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.activation(gate) * up


class _GroupedProduct(torch.autograd.Function):
    """rows [R, a] times their expert's weight [e, b, a].T -> [R, b]; products by a backend."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, gemm: GroupedGemm) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        ctx.gemm = gemm
        return _without_absent(gemm.forward(rows, weight, ends), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, ends = ctx.saved_tensors
        d_rows = _without_absent(ctx.gemm.dgrad(grads[0], weight, ends), ends)
        return d_rows, ctx.gemm.wgrad(grads[0], rows, ends), None, None


def _without_absent(rows: Tensor, ends: Tensor) -> Tensor:
    """Return `rows` with zeros past the last expert's, where backends leave arbitrary values."""
    absent = torch.arange(len(rows), device=ends.device) >= ends[-1]
    return rows.masked_fill(absent.unsqueeze(1), 0)


class _ShareOfSum(torch.autograd.Function):
    """Return 1/n of a tensor of which n ranks hold equal copies and add up their results.

    The gradient is not divided. Every rank gets the whole gradient, so the copies stay equal.
    """

    @staticmethod
    def forward(ctx: object, whole: Tensor, num_ranks: int) -> Tensor:
        return whole / num_ranks

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
