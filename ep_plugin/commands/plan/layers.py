"""What each layer of a HybridModel holds and computes: parameters, bytes kept, products.

Shapes are those that megatron-core 0.19.2 builds by its own spec of a HybridModel (Mamba-2 as in
arXiv:2405.21060, gated delta net as in arXiv:2412.06464).

Assumptions, beside those of memory.py:

- A norm stands before each layer, and none before the maps out of a latent or of queries and keys.
- `M` keeps what its fused kernel does: the projection, the scan's result and its norm. States and
  the convolution are computed again in the backward.
- `G` keeps the projection, what the convolution makes of it, queries and keys of each value head,
  the rule's result and its norm, and a 64 x 64 block of each chunk and head.
- Work is counted in operations, two for a product and its sum. Half of attention's scores are
  masked. A scan of `M` takes 7 for each value of a state, the delta rule 8. Norms, activations and
  routing beyond the router's product are not counted.

Bytes kept by `M` and `G` follow from their kernels and have not been measured.
"""

from dataclasses import dataclass

from ep_plugin.commands.plan.memory import ffn_values, kept_by_experts
from ep_plugin.commands.plan.network import Traffic, received
from ep_plugin.moe.parallel import degree

CHUNK = 64  # tokens of a chunk of the delta rule
SCAN, DELTA = 7, 8  # operations for each value of a state
BACKWARD = 2  # times the forward's work


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a HybridModel, under the names of Megatron's flags where they have one."""

    hidden_size: int
    vocab: int  # padded
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    attention_output_gate: bool
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    ffn_hidden_size: int
    moe_ffn_hidden_size: int
    moe_router_topk: int
    moe_shared_expert_intermediate_size: int
    moe_shared_expert_gate: bool
    mamba_state_dim: int
    mamba_head_dim: int
    mamba_num_groups: int
    mamba_num_heads: int
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    swiglu: bool
    bias: bool
    qkv_bias: bool
    norm: int  # parameters of one over the hidden size
    positions: int  # learned ones
    tied: bool

    @property
    def mamba_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def linear_keys(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_values(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim


@dataclass(frozen=True)
class Layer:
    """One layer: parameters by the ranks that share them, and work."""

    tensor: int = 0  # over tensor-parallel ranks
    whole: int = 0  # on each of them
    experts: int = 0  # over ep ranks and etp
    flops: float = 0.0  # of one token's forward

    def __add__(self, other: "Layer") -> "Layer":
        return Layer(
            self.tensor + other.tensor,
            self.whole + other.whole,
            self.experts + other.experts,
            self.flops + other.flops,
        )

    @property
    def params(self) -> int:
        return self.tensor + self.whole + self.experts

    def on_gpu(self, tp: int) -> int:
        """Return its parameters outside of experts on one GPU."""
        return self.tensor // tp + self.whole

    def experts_on_gpu(self, ranks: int, etp: int) -> int:
        """Return its experts' parameters on one GPU; with biases Megatron has no etp."""
        return self.experts // (ranks * etp)


def layer(symbol: str, sizes: Sizes, length: int, experts: int = 0) -> Layer:
    """Return the layer of a symbol, whose sequences have `length` tokens; `experts` are of `E`."""
    made = {
        "*": lambda: _attention(sizes, length),
        "+": lambda: _latent(sizes, length),
        "M": lambda: _mamba(sizes),
        "G": lambda: _delta(sizes),
        "-": lambda: _block(sizes, sizes.ffn_hidden_size),
        "E": lambda: _experts(sizes, experts),
    }[symbol]()
    return made + Layer(whole=sizes.norm)


def kept(symbol: str, sizes: Sizes, experts: int = 0, ep: int = 1, dedup: bool = False) -> float:
    """Return the bytes that a layer keeps for a token; bf16 where nothing else is said."""
    before = 2 * sizes.hidden_size  # its input and its norm
    if symbol == "*":
        wide, keys = _widths(sizes)
        return 2.0 * (before + 2 * wide + 2 * keys + wide * sizes.attention_output_gate)
    if symbol == "+":
        query, value, narrow = _latent_widths(sizes)
        return 2.0 * (before + narrow + 2 * query + 2 * value)
    if symbol == "M":
        made = _mamba_projection(sizes) + 2 * sizes.mamba_inner
        return 2.0 * (before + made) + 4 * sizes.mamba_num_groups
    if symbol == "G":
        heads, values = sizes.linear_num_value_heads, sizes.linear_values
        mixed = 2 * sizes.linear_keys + values
        made = _delta_projection(sizes) + mixed + 2 * heads * sizes.linear_key_head_dim
        return 2.0 * (before + made + 2 * values + CHUNK * heads) + 2 * 4 * heads  # gates in fp32
    activation = "swiglu" if sizes.swiglu else "gelu"
    if symbol == "-":
        return 2.0 * (before + ffn_values(sizes.ffn_hidden_size, activation, 1))
    topk = min(sizes.moe_router_topk, experts)
    came = received(Traffic(1, topk, sizes.hidden_size, experts), degree(ep, experts), dedup)
    shared = ffn_values(sizes.moe_shared_expert_intermediate_size, activation, 1)
    routed = kept_by_experts(topk, sizes.moe_ffn_hidden_size, activation)
    logits = 2 * 4 * experts  # and scores, fp32
    return 2.0 * (before + shared + round(came * sizes.hidden_size)) + routed + logits


def prediction(sizes: Sizes) -> Layer:
    """Return what stands around the layers of one depth of multi-token prediction."""
    joined = 2 * sizes.hidden_size * sizes.hidden_size
    return Layer(tensor=joined, whole=3 * sizes.norm, flops=2.0 * joined)


def output(sizes: Sizes) -> Layer:
    """Return the output's matrix: one of its own, or the embedding's."""
    table = sizes.vocab * sizes.hidden_size
    return Layer(tensor=table, flops=2.0 * table)


def embedding(sizes: Sizes) -> Layer:
    return Layer(tensor=sizes.vocab * sizes.hidden_size, whole=sizes.positions * sizes.hidden_size)


def _maps(*sizes: int) -> Layer:
    """Return matrices that tensor-parallel ranks share, one product a token each."""
    return Layer(tensor=sum(sizes), flops=2.0 * sum(sizes))


def _widths(sizes: Sizes) -> tuple[int, int]:
    return (
        sizes.num_attention_heads * sizes.kv_channels,
        sizes.num_query_groups * sizes.kv_channels,
    )


def _attention(sizes: Sizes, length: int) -> Layer:
    wide, keys = _widths(sizes)
    made = (1 + sizes.attention_output_gate) * wide + 2 * keys
    biases = made if sizes.bias or sizes.qkv_bias else 0
    return _maps(sizes.hidden_size * made, sizes.hidden_size * wide) + Layer(
        tensor=biases, whole=sizes.hidden_size * sizes.bias, flops=2.0 * length * wide
    )


def _latent_widths(sizes: Sizes) -> tuple[int, int, int]:
    heads = sizes.num_attention_heads
    narrow = (sizes.q_lora_rank or 0) + sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim
    query = heads * (sizes.qk_head_dim + sizes.qk_pos_emb_head_dim)
    return query, heads * sizes.v_head_dim, narrow


def _latent(sizes: Sizes, length: int) -> Layer:
    query, value, narrow = _latent_widths(sizes)
    down = sizes.hidden_size * narrow  # Megatron does not cut it
    up = (
        (sizes.q_lora_rank or sizes.hidden_size) * query,
        sizes.kv_lora_rank * (sizes.num_attention_heads * sizes.qk_head_dim + value),
        value * sizes.hidden_size,
    )
    return _maps(*up) + Layer(
        whole=down + sizes.hidden_size * sizes.bias,
        flops=2.0 * down + float(length * (query + value)),
    )


def _block(sizes: Sizes, ffn: int) -> Layer:
    rows = ffn * (2 if sizes.swiglu else 1)
    return _maps(sizes.hidden_size * rows, ffn * sizes.hidden_size) + Layer(
        tensor=rows * sizes.bias, whole=sizes.hidden_size * sizes.bias
    )


def _experts(sizes: Sizes, experts: int) -> Layer:
    one = _block(sizes, sizes.moe_ffn_hidden_size)
    router = experts * sizes.hidden_size
    found = Layer(
        whole=router + experts * sizes.bias,
        experts=experts * one.params,
        flops=2.0 * router + min(sizes.moe_router_topk, experts) * one.flops,
    )
    if sizes.moe_shared_expert_intermediate_size:
        gate = sizes.hidden_size * sizes.moe_shared_expert_gate
        found += _block(sizes, sizes.moe_shared_expert_intermediate_size)
        found += Layer(whole=gate, flops=2.0 * gate)
    return found


def _mamba_projection(sizes: Sizes) -> int:
    """Return the width of what its first map makes: gate, inputs, B, C and steps."""
    groups = sizes.mamba_num_groups * sizes.mamba_state_dim
    return 2 * sizes.mamba_inner + 2 * groups + sizes.mamba_num_heads


def _mamba(sizes: Sizes) -> Layer:
    inner, width = sizes.mamba_inner, 4  # of the convolution, which has no flag
    channels = inner + 2 * sizes.mamba_num_groups * sizes.mamba_state_dim
    beside = channels + 3 * sizes.mamba_num_heads + inner  # biases; steps, A and D; the norm
    return _maps(sizes.hidden_size * _mamba_projection(sizes), inner * sizes.hidden_size) + Layer(
        tensor=width * channels + beside,
        flops=2.0 * width * channels + SCAN * inner * sizes.mamba_state_dim,
    )


def _delta_projection(sizes: Sizes) -> int:
    """Return the width of what its first map makes: q, k, v, gate, beta and alpha."""
    return 2 * sizes.linear_keys + 2 * sizes.linear_values + 2 * sizes.linear_num_value_heads


def _delta(sizes: Sizes) -> Layer:
    channels = 2 * sizes.linear_keys + sizes.linear_values
    convolution = sizes.linear_conv_kernel_dim * channels
    norm = sizes.linear_value_head_dim * (sizes.norm // sizes.hidden_size)
    return _maps(
        sizes.hidden_size * _delta_projection(sizes), sizes.linear_values * sizes.hidden_size
    ) + Layer(
        tensor=convolution + 2 * sizes.linear_num_value_heads,
        whole=norm,
        flops=2.0 * convolution
        + DELTA
        * sizes.linear_num_value_heads
        * sizes.linear_key_head_dim
        * sizes.linear_value_head_dim,
    )
