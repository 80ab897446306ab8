"""DeepSeek-V3 (arXiv:2412.19437): top-8 of 256 by sigmoid, balanced by a bias instead of a loss.

A bias per expert, moved by 1e-3 a step towards even load (arXiv:2408.15664), is added to the scores
for the choice alone; weights are the chosen scores divided by their sum, times 2.5. A token chooses
inside 4 of 8 groups of experts (nodes), ranked by the sum of their two best. A loss of 1e-4 per
sequence guards against extremes. One shared expert; the first three layers are dense; nothing is
dropped. The bias rate is 0 for the last 500B tokens: `--moe-router-bias-update-rate 0`.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import LatentAttention, Model, Preset

ROUTING = RoutingConfig(
    topk=8,
    score_function="sigmoid",
    scaling_factor=2.5,
    num_groups=8,
    group_topk=4,
    expert_bias=True,
    bias_update_rate=1e-3,
    aux_loss_coeff=1e-4,
    aux_loss_scope="sequence",
)
MODEL = Model(
    hidden=7168,
    heads=128,
    head_dim=128,
    vocab=129_280,
    experts=(0,) * 3 + (256,) * 58,
    dense_ffn=18432,
    expert_ffn=2048,
    shared_ffn=2048,
    norm_epsilon=1e-6,
    latent=LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
)

PRESETS = (
    Preset(
        name="deepseek-v3",
        system="DeepSeek-V3",
        source="arXiv:2412.19437, section 4.2",
        model=MODEL,
        routing=ROUTING,
        seq_length=4096,
        init_std=0.006,
        note="without its multi-token prediction module",
    ),
    Preset(
        name="v3-nano",
        system="DeepSeek-V3",
        source="the routing of deepseek-v3 at a size for tests",
        model=replace(
            MODEL,
            hidden=64,
            heads=4,
            head_dim=16,
            vocab=256,
            experts=(0, 16, 16, 16),
            dense_ffn=256,
            expert_ffn=64,
            shared_ffn=64,
            latent=None,
        ),
        routing=replace(ROUTING, topk=4, num_groups=4, group_topk=2),
        seq_length=64,
        note="with ordinary attention: Megatron's latent attention needs Transformer Engine",
    ),
)
