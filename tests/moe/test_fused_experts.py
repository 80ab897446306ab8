"""The fused experts: against the float64 oracle, and in FP8 against an ideal quantiser."""

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from tolerance import assert_close, error
from torch import Tensor

from ep_plugin import ConfigError, MoEConfig
from ep_plugin.moe.e4m3 import whole_blocks
from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.experts.fused import Bf16, FusedExperts, Keep
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Dispatched
from ep_plugin.moe.rows import expert_rows

N, C, E, H, F = 40, 2, 4, 64, 48
CONFIG = MoEConfig(hidden_size=H, ffn_hidden_size=F, num_experts=E)


def make_inbox(
    generator: torch.Generator, dtype: torch.dtype, outliers: bool, count: int = N, width: int = H
) -> Dispatched:
    """Tokens with choices, some absent, and one expert without any; the leaf tensors want grads."""
    scores = torch.rand(count, E - 1, generator=generator)
    ids = scores.topk(C, dim=1).indices
    ids[torch.rand(count, C, generator=generator) < 0.2] = -1
    tokens = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if outliers:  # heavy tails: some features and tokens are hundreds of times larger
        tokens *= torch.randn(1, width, generator=generator).exp() ** 2
        tokens *= torch.randn(count, 1, generator=generator).exp()
    probs = torch.rand(count, C, generator=generator, dtype=torch.float64)
    probs = probs.masked_fill(ids < 0, 0)
    counts = torch.bincount(ids[ids >= 0], minlength=E)
    leaves = (tokens.to(dtype).requires_grad_(), probs.to(dtype).requires_grad_())
    return Dispatched(leaves[0], ids, leaves[1], counts, None)


def make_experts(config: MoEConfig, dtype: torch.dtype, generator: torch.Generator) -> Experts:
    experts = Experts(config, ExpertGroups(), dtype=dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(values.bfloat16())
    return experts


def fused(experts: Experts, inbox: Dispatched, save: Any) -> Tensor:
    """The fused path without FP8, on the twins."""
    rows = expert_rows(inbox.expert_ids, inbox.tokens_per_expert, experts.config.activation)
    recipe = Bf16(rows, experts.linear_fc1.pick_gemm(len(rows.order)))
    weights = (experts.linear_fc1.weight, experts.linear_fc2.weight)
    output: Tensor = FusedExperts.apply(
        inbox.tokens, inbox.probs, *weights, recipe, Keep(save), None, None
    )
    return output


def gradients(output: Tensor, inbox: Dispatched, experts: Experts, seed: Tensor) -> list[Tensor]:
    leaves = (inbox.tokens, inbox.probs, *experts.parameters())
    return [output, *torch.autograd.grad(output, leaves, seed.to(output.dtype))]


def oracle(inbox: Dispatched, experts: Experts, seed: Tensor) -> list[Tensor]:
    """Output and gradients in float64, token by token."""
    tokens, probs, fc1, fc2 = (
        leaf.detach().double().requires_grad_()
        for leaf in (inbox.tokens, inbox.probs, *experts.parameters())
    )
    zeros = {"fc1_bias": fc1.new_zeros(fc1.shape[:2]), "fc2_bias": fc2.new_zeros(fc2.shape[:2])}
    weights = {"fc1": fc1, "fc2": fc2, **zeros}
    output = reference.moe(tokens, inbox.expert_ids, probs, weights, experts.config.activation)
    return [output, *torch.autograd.grad(output, (tokens, probs, fc1, fc2), seed.double())]


NAMES = ("output", "token gradient", "probability gradient", "fc1 gradient", "fc2 gradient")


@pytest.mark.parametrize("save", ["bf16", "recompute"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "gelu", "relu"])
def test_the_fused_function_equals_the_oracle(activation: Any, save: str) -> None:
    generator = torch.Generator().manual_seed(1)
    experts = make_experts(replace(CONFIG, activation=activation), torch.float64, generator)
    inbox = make_inbox(generator, torch.float64, outliers=True)
    seed = torch.randn(N, H, generator=generator, dtype=torch.float64)
    found = gradients(fused(experts, inbox, save), inbox, experts, seed)
    for name, x, y in zip(NAMES, found, oracle(inbox, experts, seed), strict=True):
        assert_close(x, y, torch.float32, name)  # sums of rows and of squares are kept in fp32


def rounded(matrix: Tensor, lines: tuple[int, int]) -> Tensor:
    """Round once to e4m3 with a power of two for each block of so many rows and columns."""
    result = torch.empty_like(matrix)
    for i in range(0, matrix.shape[0], lines[0]):
        for j in range(0, matrix.shape[1], lines[1]):
            block = matrix[i : i + lines[0], j : j + lines[1]]
            scale = torch.exp2(torch.ceil(torch.log2(block.abs().amax().clamp(min=1e-30) / 448)))
            small = (block / scale).float().to(torch.float8_e4m3fn).double()
            result[i : i + lines[0], j : j + lines[1]] = small * scale
    return result


ALL = 10**6
# Rows and columns that share a scale: of rows, of weights in forward, in data gradient, and of
# operands of weight gradients.
LINES: dict[str, list[tuple[int, int]]] = {
    "rowwise": [(1, ALL), (1, ALL), (ALL, ALL), (ALL, ALL)],
    "blockwise": [(1, 128), (128, 128), (128, 128), (128, 1)],
}


def ideal(inbox: Dispatched, experts: Experts, seed: Tensor) -> list[Tensor]:
    """Output and gradients with every operand of a product rounded once, and exact products."""
    config = experts.config
    of_rows, forward, dgrad, wgrad = LINES[config.fp8]
    fc1, fc2 = (parameter.detach().double() for parameter in experts.parameters())
    tokens, probs = inbox.tokens.detach().double(), inbox.probs.detach().double()
    output, d_tokens = torch.zeros_like(tokens), torch.zeros_like(tokens)
    d_probs, d_fc1, d_fc2 = (torch.zeros_like(t) for t in (probs, fc1, fc2))

    def column(matrix: Tensor) -> Tensor:
        return rounded(matrix, wgrad) if config.fp8_wgrad == "fp8" else matrix

    for e in range(E):
        token, choice = (inbox.expert_ids == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        x, p, d_y = tokens[token], probs[token, choice].unsqueeze(1), seed.double()[token]
        h = rounded(x, of_rows) @ rounded(fc1[e], forward).T
        h.requires_grad_()
        width = h.shape[1] // 2
        value = torch.nn.functional.silu(h[:, :width]) * h[:, width:]
        a = (value * p).detach()
        output.index_add_(0, token, rounded(a, of_rows) @ rounded(fc2[e], forward).T)
        d_a = rounded(d_y, of_rows) @ rounded(fc2[e], dgrad)
        d_probs[token, choice] = (d_a * value.detach()).sum(1)
        d_h = torch.autograd.grad(value, h, d_a * p)[0]
        d_tokens.index_add_(0, token, rounded(d_h, of_rows) @ rounded(fc1[e], dgrad))
        d_fc1[e] = column(d_h).T @ column(x)
        d_fc2[e] = column(d_y).T @ column(a)
    return [output, d_tokens, d_probs, d_fc1, d_fc2]


SIZES = {"rowwise": (N, H, F, 8), "blockwise": (300, 256, 128, 2)}  # tokens, sizes, repeats


@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("fp8", LINES)
def test_fp8_is_as_good_as_an_ideal_quantiser(fp8: Any, outliers: bool, wgrad: Any) -> None:
    """Errors against float64 at most 1.05 times those of rounding every operand just once."""
    ours, best = torch.zeros(len(NAMES)), torch.zeros(len(NAMES))
    count, width, ffn, repeats = SIZES[fp8]
    config = MoEConfig(hidden_size=width, ffn_hidden_size=ffn, num_experts=E)
    config = replace(config, fp8=fp8, fp8_wgrad=wgrad)
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        experts = make_experts(config, torch.bfloat16, generator)
        inbox = make_inbox(generator, torch.bfloat16, outliers, count, width)
        cotangent = torch.randn(count, width, generator=generator).bfloat16()
        exact = oracle(inbox, experts, cotangent)
        found = gradients(experts(inbox), inbox, experts, cotangent)
        reached = ideal(inbox, experts, cotangent)
        ours += torch.tensor([error(x, y) ** 0.5 for x, y in zip(found, exact, strict=True)])
        best += torch.tensor([error(x, y) ** 0.5 for x, y in zip(reached, exact, strict=True)])
    for name, x, y in zip(NAMES, ours.tolist(), best.tolist(), strict=True):
        assert x <= 1.05 * y, f"{name}: {x / repeats:.4f}, ideal {y / repeats:.4f}"
        assert x > 0.2 * y, f"{name}: FP8 was not used"


@pytest.mark.parametrize("fp8", LINES)
@pytest.mark.parametrize(("save", "bound"), [("recompute", 1e-12), ("fp8", 0.05)])
def test_saving_less_changes_gradients_alone(save: Any, bound: float, fp8: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    count, width, ffn, _ = SIZES[fp8]
    config = MoEConfig(hidden_size=width, ffn_hidden_size=ffn, num_experts=E, fp8=fp8)
    kept = make_experts(config, torch.bfloat16, generator)
    less = Experts(replace(config, save=save), ExpertGroups(), dtype=torch.bfloat16)
    less.load_state_dict(kept.state_dict())
    inbox = make_inbox(generator, torch.bfloat16, False, count, width)
    seed = torch.randn(count, width, generator=generator)
    expected = gradients(kept(inbox), inbox, kept, seed)
    found = gradients(less(inbox), inbox, less, seed)
    assert torch.equal(found[0], expected[0])
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert error(x, y) ** 0.5 <= bound, name


@pytest.mark.parametrize("fp8", ["off", *LINES])
@pytest.mark.parametrize("save", ["bf16", "fp8"])
@pytest.mark.parametrize("rows", [16, 128, 256, 10**6])
def test_rows_beyond_the_capacity_of_a_rank_are_computed_in_more_passes(
    rows: int, save: Any, fp8: Any
) -> None:
    """Results are alike but for the last bit, and for pre-activations that are kept in e4m3."""
    generator = torch.Generator().manual_seed(2)
    count, width, ffn = 150, 64, 48  # 300 rows
    config = MoEConfig(
        hidden_size=width, ffn_hidden_size=ffn, num_experts=E, fp8=fp8, save=save,
        rank_capacity=1.0,
    )  # fmt: skip
    experts = make_experts(config, torch.bfloat16, generator)
    inbox = make_inbox(generator, torch.bfloat16, False, count, width)
    seed = torch.randn(count, width, generator=generator)
    kept: list[torch.Size] = []

    def at_most(number: int | None) -> list[Tensor]:
        experts.keep = lambda share=1.0: Keep(save, number)  # type: ignore[method-assign]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
        ):
            output = experts(inbox)
        return gradients(output, inbox, experts, seed)

    whole = at_most(None)
    kept.clear()
    found = at_most(rows)
    held = [shape[0] for shape in kept if shape[-1] in (2 * ffn, 2 * whole_blocks(ffn))]
    assert held[-1] == min(rows, C * count)
    for name, x, y in zip(NAMES, found, whole, strict=True):
        if rows >= C * count:
            assert torch.equal(x, y), name
        exact = save == "bf16" or name == "output"
        assert error(x, y) < (2**-9 if exact else 0.05) ** 2, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("fp8", LINES)
def test_any_dtype_and_a_rank_without_tokens(fp8: Any, wgrad: Any, dtype: torch.dtype) -> None:
    """Gradients have the dtypes of their leaves, and equal bits; without tokens they are 0."""
    _, width, ffn, _ = SIZES[fp8]
    config = MoEConfig(hidden_size=width, ffn_hidden_size=ffn, num_experts=E)
    config = replace(config, fp8=fp8, fp8_wgrad=wgrad)
    for count in (0, N):
        generator = torch.Generator().manual_seed(4)
        narrow = make_experts(config, torch.bfloat16, generator)
        experts = Experts(config, ExpertGroups(), dtype=dtype)
        experts.load_state_dict(narrow.state_dict())  # the same values
        inbox = make_inbox(generator, torch.bfloat16, False, count, width)
        leaf = inbox.tokens.detach().to(dtype).requires_grad_()
        wide = replace(inbox, tokens=leaf)
        seed = torch.randn(count, width, generator=generator).bfloat16()
        found = gradients(experts(wide), wide, experts, seed)
        expected = gradients(narrow(inbox), inbox, narrow, seed)
        assert [x.dtype for x in found] == [dtype, dtype, torch.bfloat16, dtype, dtype]
        for name, x, y in zip(NAMES, found, expected, strict=True):
            assert torch.equal(x.bfloat16(), y), name
        if not count:
            assert not any(x.any() for x in found)


class Sums:
    """Totals that held something before."""

    def __init__(self, experts: Experts) -> None:
        self.pair = [torch.ones_like(p, dtype=torch.float32) for p in experts.parameters()]

    def take(self) -> Any:
        return tuple(self.pair)


@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("fp8", ["rowwise", "blockwise"])
def test_weight_gradients_are_added_to_totals(fp8: Any, wgrad: Any) -> None:
    generator = torch.Generator().manual_seed(8)
    count, width, ffn, _ = SIZES[fp8]
    config = MoEConfig(hidden_size=width, ffn_hidden_size=ffn, num_experts=E)
    config = replace(config, fp8=fp8, fp8_wgrad=wgrad)
    experts = make_experts(config, torch.bfloat16, generator)
    inbox = make_inbox(generator, torch.bfloat16, False, count, width)
    seed = torch.randn(count, width, generator=generator)
    plain = gradients(experts(inbox), inbox, experts, seed)
    experts.totals = sums = Sums(experts)
    for calls in (1, 2):
        found = gradients(experts(inbox), inbox, experts, seed)
        for name, x, y in zip(NAMES[:3], found, plain, strict=False):
            assert torch.equal(x, y), name
        for name, total, gradient in zip(NAMES[3:], sums.pair, plain[3:], strict=True):
            expected = 1 + calls * gradient.float()
            assert error(total, expected) < 2**-8, name  # that one was rounded to bf16
            assert gradient.float().norm() > 1, name


def test_weights_are_quantised_when_told() -> None:
    """Once per call on its own; once per first micro-batch when the training loop says so."""
    generator = torch.Generator().manual_seed(3)
    experts = make_experts(replace(CONFIG, fp8="rowwise"), torch.bfloat16, generator)
    inbox = make_inbox(generator, torch.bfloat16, outliers=False)
    before = experts(inbox)
    with torch.no_grad():
        experts.linear_fc1.weight.mul_(2)
    changed = experts(inbox)
    assert not torch.equal(before, changed)
    experts.weights_change_every_call = False
    experts(inbox)
    with torch.no_grad():
        experts.linear_fc1.weight.mul_(2)
    assert torch.equal(experts(inbox), changed)
    experts.is_first_microbatch = True
    assert not torch.equal(experts(inbox), changed)


def test_fp8_refuses_biases() -> None:
    with pytest.raises(ConfigError, match="use bias=False or fp8='off'"):
        replace(CONFIG, bias=True, fp8="rowwise")


def test_fp8_refuses_sizes_it_has_no_product_for() -> None:
    config = replace(CONFIG, hidden_size=128, ffn_hidden_size=40, fp8="rowwise")
    message = (
        r"ffn_hidden_size on each rank \(40\).*use 48 on each rank, fp8='blockwise', which takes "
        "any size, or fp8='off'"
    )
    with pytest.raises(ConfigError, match=message):
        Experts(config, ExpertGroups())


@pytest.mark.parametrize(("width", "ffn"), [(200, 72), (64, 128), (256, 180), (33, 7)])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
def test_blocks_of_any_size_are_those_of_padded_experts(
    width: int, ffn: int, activation: Any, wgrad: Any
) -> None:
    """Bit for bit: as if the weights and tokens had been padded with zeros by the user."""
    generator = torch.Generator().manual_seed(6)
    config = MoEConfig(
        hidden_size=width, ffn_hidden_size=ffn, num_experts=E, activation=activation,
        fp8="blockwise", fp8_wgrad=wgrad,
    )  # fmt: skip
    large, more = whole_blocks(width), whole_blocks(ffn)
    experts = make_experts(config, torch.bfloat16, generator)
    padded = Experts(
        replace(config, hidden_size=large, ffn_hidden_size=more),
        ExpertGroups(),
        dtype=torch.bfloat16,
    )
    parts = 2 if config.gated else 1

    def cut(whole: list[Tensor]) -> list[Tensor]:
        output, d_tokens, d_probs, d_fc1, d_fc2 = whole
        d_fc1 = d_fc1.unflatten(1, (parts, more))[:, :, :ffn, :width].flatten(1, 2)
        return [output[:, :width], d_tokens[:, :width], d_probs, d_fc1, d_fc2[:, :width, :ffn]]

    with torch.no_grad():
        for parameter in padded.parameters():
            parameter.zero_()
        fc1 = padded.linear_fc1.weight.unflatten(1, (parts, more))
        fc1[:, :, :ffn, :width] = experts.linear_fc1.weight.unflatten(1, (parts, ffn))
        padded.linear_fc2.weight[:, :width, :ffn] = experts.linear_fc2.weight
    inbox = make_inbox(generator, torch.bfloat16, True, 150, width)
    tokens = torch.nn.functional.pad(inbox.tokens.detach(), (0, large - width)).requires_grad_()
    wide = replace(inbox, tokens=tokens)
    seed = torch.randn(150, width, generator=generator)
    whole_seed = torch.nn.functional.pad(seed, (0, large - width))
    found = gradients(experts(inbox), inbox, experts, seed)
    expected = cut(gradients(padded(wide), wide, padded, whole_seed))
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert torch.equal(x, y), name
        assert x.any(), name
    sums = experts.totals, padded.totals = Sums(experts), Sums(padded)
    gradients(experts(inbox), inbox, experts, seed)
    gradients(padded(wide), wide, padded, whole_seed)
    whole = cut([*(torch.zeros(1, large), torch.zeros(1, large), wide.probs), *sums[1].pair])
    for x, y in zip(sums[0].pair, whole[3:], strict=True):
        # In bf16, sizes that are no multiples of 8 are rounded before they are added.
        assert torch.equal(x, y) if wgrad == "fp8" else error(x, y) < 2**-16


@pytest.mark.parametrize("fp8", LINES)
def test_rows_of_zeros_leave_small_gradients_alone(fp8: Any) -> None:
    """Tokens that no loss comes from share scales with the others in weight gradients."""
    generator = torch.Generator().manual_seed(5)
    count, width, ffn, _ = SIZES[fp8]
    config = MoEConfig(hidden_size=width, ffn_hidden_size=ffn, num_experts=E, fp8=fp8)
    experts = make_experts(config, torch.bfloat16, generator)
    inbox = make_inbox(generator, torch.bfloat16, False, count, width)
    seed = torch.randn(count, width, generator=generator)
    seed[::3] = 0
    plain = gradients(experts(inbox), inbox, experts, seed)
    small = gradients(experts(inbox), inbox, experts, seed * 2**-30)
    for name, x, y in zip(NAMES[1:], small[1:], plain[1:], strict=True):
        assert torch.equal(x * 2**30, y), name
