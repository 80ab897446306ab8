"""The gate: one score per token and expert, from a linear map that every rank holds."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.router import _random
from ep_plugin.moe.router._losses import add_loss

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Gate(nn.Module):
    """Weight [E, H] and bias [E] or None; what every router needs before it chooses.

    `attach_loss(carrier, loss)` returns `carrier` such that the backward also gets the gradient
    of `loss` [] ; replace it to scale auxiliary losses as your training loop scales its own.
    """

    def __init__(
        self,
        config: MoEConfig,
        groups: ExpertGroups,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.routing, self.groups = config, config.routing, groups
        shape = (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))  # [E, H]
        self.bias = (
            nn.Parameter(torch.empty(config.num_experts, device=device, dtype=dtype))
            if config.routing.router_bias
            else None
        )
        self.attach_loss: Callable[[Tensor, Tensor], Tensor] = add_loss

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, E] in fp32 (fp64 when asked) for `hidden` [T, H], and `hidden` to go on with.

        Switch Transformer (arXiv:2101.03961, section 2.4) casts the input before the product;
        `router_dtype` model casts the product.
        """
        plain = self.bias is None and self.routing.router_dtype == "fp32" and not self._jitters()
        if plain and hidden.is_cuda:
            from ep_plugin.moe.kernels import gate  # it needs Triton, which the CPU does not

            if gate.fits(hidden, self.weight):
                return gate.gate_logits(hidden, self.weight)
        dtype = _DTYPES.get(self.routing.router_dtype, hidden.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = F.linear(self._jitter(hidden).to(dtype), self.weight.to(dtype), bias)
        return logits if logits.dtype == torch.float64 else logits.float(), hidden

    def _jitters(self) -> bool:
        return self.training and self.routing.jitter_eps > 0

    def _jitter(self, hidden: Tensor) -> Tensor:
        eps = self.routing.jitter_eps
        if not self._jitters():
            return hidden
        # In fp32: bf16 has five values in 1 +- 0.01.
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        return wide * (1 - eps + 2 * eps * _random.uniform(tuple(wide.shape), wide))

    def wants_losses(self) -> bool:
        """Whether this pass has a backward that auxiliary losses can join.

        Evaluation and the first pass of activation recomputation have none.
        """
        return self.training and torch.is_grad_enabled()
