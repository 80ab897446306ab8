"""The experts of one rank: fc1, activation times probability, fc2, on expert-major rows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_plugin.config import ConfigError, MoEConfig, largest_divisor
from ep_plugin.contracts import Dispatched, GroupedGemm
from ep_plugin.groups import ExpertGroups
from ep_plugin.registry import resolve


def _gelu(hidden: Tensor) -> Tensor:
    return F.gelu(hidden)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": _gelu,
    "gelu": _gelu,
    "relu": F.relu,
}


class GroupedLinear(nn.Module):
    """One linear map per local expert: weight [e, out, in], bias [e, out] or None."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool,
        gemm: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (num_experts, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype)) if bias else None
        )
        # `auto` is settled per call, since a layer may be built on the CPU and moved.
        self.gemm: GroupedGemm | None = None
        if gemm != "auto":
            self.gemm = resolve("gemm", gemm)(in_features, out_features, self.weight.dtype)

    def forward(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Map `rows` [R, in], without the bias: [R, out]."""
        gemm = self.gemm or auto_gemm(self.weight)
        return gemm(rows, self.weight, tokens_per_expert)

    def bias_rows(self, tokens_per_expert: Tensor, num_rows: int) -> Tensor:
        """Return the bias of each row's expert: [R, out]."""
        assert self.bias is not None
        return self.bias.repeat_interleave(tokens_per_expert, dim=0, output_size=num_rows)


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
        if ffn % etp:
            raise ConfigError(
                f"ffn_hidden_size ({ffn}) must be divisible by etp ({etp}); "
                f"etp = {largest_divisor(ffn, etp)} would do"
            )
        self.num_local_experts = config.num_experts // groups.ep_size
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        self.etp_size = etp
        shard = ffn // etp

        def linear(in_features: int, out_features: int) -> GroupedLinear:
            return GroupedLinear(
                self.num_local_experts,
                in_features,
                out_features,
                config.bias,
                config.gemm,
                device,
                dtype,
            )

        self.linear_fc1 = linear(config.hidden_size, shard * (2 if config.gated else 1))
        self.linear_fc2 = linear(shard, config.hidden_size)

    def forward(self, inbox: Dispatched) -> Tensor:
        """Return [R, H], each row times its probability; with etp a summand of it."""
        tokens_per_expert, num_rows = inbox.tokens_per_expert, inbox.rows.shape[0]
        probs = inbox.probs.unsqueeze(1)  # [R, 1]
        hidden = self.linear_fc1(inbox.rows, tokens_per_expert)  # [R, F or 2F]
        if self.linear_fc1.bias is not None:
            hidden = hidden + self.linear_fc1.bias_rows(tokens_per_expert, num_rows)
        hidden = (self._activate(hidden) * probs).to(inbox.rows.dtype)  # [R, F]
        output: Tensor = self.linear_fc2(hidden, tokens_per_expert)  # [R, H]
        if self.linear_fc2.bias is not None:
            bias = self.linear_fc2.bias_rows(tokens_per_expert, num_rows)
            output = output + (_ShareOfSum.apply(bias, self.etp_size) * probs).to(output.dtype)
        return output

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.activation(gate) * up


class _ShareOfSum(torch.autograd.Function):
    """1/n of a tensor that n ranks hold alike and whose outputs are summed.

    The gradient is not divided: each rank gets the whole one, so the copies stay alike.
    """

    @staticmethod
    def forward(ctx: object, whole: Tensor, num_ranks: int) -> Tensor:
        return whole / num_ranks

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def auto_gemm(weight: Tensor) -> GroupedGemm:
    """Return the backend `auto` stands for: `torch_grouped` for bf16 on CUDA, else `loop`."""
    _, out_features, in_features = weight.shape
    grouped = (
        weight.is_cuda
        and weight.dtype == torch.bfloat16
        and in_features % 8 == 0
        and out_features % 8 == 0
    )
    name = "torch_grouped" if grouped else "loop"
    backend: GroupedGemm = resolve("gemm", name)(in_features, out_features, weight.dtype)
    return backend
