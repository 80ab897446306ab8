"""Balancing losses and loads of layers used several times, and of several models."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from core_loop import Scalars, train, without_the_plugin
from core_model import EXPERTS, HIDDEN, LENGTH, VOCAB, Case, transformer_config
from forked import connect, one_rank
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams import install as hooks
from ep_plugin.megatron.settings import EdgeSettings

Found = tuple[dict[str, Tensor], list[float]]


def mtp_config(repeated: bool, **changes: Any) -> Any:
    """Return the configuration of two decoder layers and two tokens predicted ahead."""
    config = transformer_config(Case("mtp", layers=2))
    config.mtp_num_layers, config.mtp_use_repeated_layer = 2, repeated
    config.moe_aux_loss_coeff, config.moe_z_loss_coeff = 1.0, None
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def mtp_model(config: Any) -> Any:
    """Return a GPT with layers of multi-token prediction, alike for every block."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    torch.manual_seed(1)
    local = {"use_transformer_engine": False}
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, normalization="RMSNorm", **local)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        mtp_block_spec=gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, **local),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
    )


def auxiliary(config: Any) -> Found:
    """Return what auxiliary losses alone give each router, and Megatron's record of them."""
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    MTPLossAutoScaler.set_loss_scale(torch.tensor(0.0))
    record = recorded()
    for name in record:
        record[name].zero_()
    model = mtp_model(config)
    (losses_of(model) * 0).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if n.endswith("router.weight")}
    (values,) = recorded().values()
    return grads, values.tolist()


def losses_of(model: Any) -> Tensor:
    """Return the losses [2, S] of one micro-batch, which has the same tokens every time."""
    tokens = torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(LENGTH).expand(2, -1)
    losses: Tensor = model(tokens[:, :-1], positions, hidden, labels=tokens[:, 1:])
    return losses


def recorded() -> dict[str, Tensor]:
    """Return Megatron's own collection of losses, by name: [layers]."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker"):
        return {n: e["values"] for n, e in moe_utils.get_moe_layer_wise_logging_tracker().items()}
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    return {n: e.values for n, e in get_moe_metrics_tracker().metrics.items()}


def has_repeated_layers() -> bool:
    """Whether this release can use one layer of multi-token prediction several times."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return hasattr(TransformerConfig, "mtp_use_repeated_layer")


def a_repeated_layer_counts_once() -> None:
    """Routers' gradients and the record are those of Megatron's own block, repeated or not."""
    cases = [mtp_config(False), *([mtp_config(True)] if has_repeated_layers() else [])]
    without_the_plugin()
    one_rank()
    theirs = [auxiliary(config) for config in cases]
    hooks.install()
    for config, (grads, values) in zip(cases, theirs, strict=True):
        found, record = auxiliary(config)
        assert found.keys() == grads.keys()
        assert len(found) == (3 if config.mtp_use_repeated_layer else 4)
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(torch.tensor(record), torch.tensor(values))


def a_repeated_layer_s_z_loss_counts_once_here_alone() -> None:
    """Megatron counts the z-loss of a repeated layer as often as it is used."""
    if not has_repeated_layers():
        return
    config = mtp_config(True, moe_router_load_balancing_type="none", moe_z_loss_coeff=1.0)
    without_the_plugin()
    one_rank()
    theirs, values = auxiliary(config)
    hooks.install()
    ours, record = auxiliary(config)
    (name,) = (name for name in ours if name.startswith("mtp"))
    torch.testing.assert_close(ours[name] * 2, theirs[name], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.tensor(record), torch.tensor(values))


def loads_have_rows_of_their_own() -> None:
    """The log has each layer's own shares, layers of multi-token prediction behind the others."""
    hooks.install()
    one_rank()
    for repeated in (False, *([True] if has_repeated_layers() else [])):
        model = mtp_model(mtp_config(repeated))
        chosen: dict[int, Tensor] = {}
        routers = [p for n, p in model.named_modules() if n.endswith("mlp.router")]
        for row, router in enumerate(routers, start=1):
            router.register_forward_hook(count_into(chosen, row))
        losses_of(model).sum().backward()
        written = Scalars()
        layer_class().tracker.write(1, written, None)
        assert len(routers) == (3 if repeated else 4)
        for row in range(1, len(routers) + 1):
            shares = [written[f"ep/tokens_per_expert/layer_{row}/expert_{e}"] for e in range(8)]
            expected = chosen[row] / chosen[row].sum()
            torch.testing.assert_close(torch.tensor(shares), expected)
        assert f"ep/max_over_mean/layer_{len(routers) + 1}" not in written
        del model, routers


def count_into(chosen: dict[int, Tensor], row: int) -> Any:
    """Return a hook that adds up what a router chooses."""

    def hook(router: Any, inputs: Any, routing: Any) -> None:
        counts = torch.bincount(routing.expert_ids.flatten(), minlength=EXPERTS).float()
        chosen[row] = chosen.get(row, torch.zeros(EXPERTS)) + counts

    return hook


def layer_class() -> Any:
    """Return the class that install put in Megatron's place."""
    from megatron.core.models.gpt import moe_module_specs

    return moe_module_specs.MoELayer


def models_do_not_mix() -> None:
    """Two models of the same sizes, one of others, and a teacher that is evaluated; interleaved."""
    hooks.install(EdgeSettings(metrics=True))
    one_rank()
    torch.manual_seed(0)
    config = transformer_config(Case("policy", layers=2))
    other = transformer_config(Case("reward", layers=3))
    other.num_moe_experts = 4
    models = [layers_of(config, 2), layers_of(config, 2), layers_of(other, 3)]
    teacher = layers_of(other, 3)
    loads: list[list[Tensor]] = []
    for step in range(2):
        loads = [[torch.zeros(layer.config.num_moe_experts) for layer in m] for m in models]
        for _ in range(2):
            for model, counts in zip(models, loads, strict=True):
                for layer, count in zip(model, counts, strict=True):
                    counted(layer, count)
                with torch.no_grad():
                    for layer in teacher:
                        layer.eval()(torch.randn(3, 1, HIDDEN))
        written = Scalars()
        layer_class().tracker.write(step, written, None)
        for prefix, counts in zip(("ep", "ep/model_2", "ep/model_3"), loads, strict=True):
            for row, count in enumerate(counts, start=1):
                tag = f"{prefix}/tokens_per_expert/layer_{row}/expert_"
                shares = [written[f"{tag}{e}"] for e in range(len(count))]
                torch.testing.assert_close(torch.tensor(shares), count / count.sum())
                assert f"{prefix}/load_balancing_loss/layer_{row}" in written
        assert not [tag for tag in written if tag.startswith("ep/model_4")]
        assert len(recorded()["load_balancing_loss"]) == 3


def layers_of(config: Any, number: int) -> list[Any]:
    """Return so many of our blocks, numbered as one model's."""
    layers = []
    for row in range(1, number + 1):
        layer = layer_class()(config)
        layer.set_layer_number(row)
        layers.append(layer)
    return layers


def counted(layer: Any, count: Tensor) -> None:
    """Train `layer` on some tokens; add what it chose to `count` [E]."""
    hidden = torch.randn(5, 1, HIDDEN)
    with torch.no_grad():
        chosen = (hidden[:, 0] @ layer.router.weight.T).topk(2).indices
    count += torch.bincount(chosen.flatten(), minlength=len(count))
    layer(hidden)[0].sum().backward()


def one_strength() -> None:
    """Auxiliary losses are as strong with --calculate-per-token-loss as without, whatever counts.

    Every micro-batch has as many counted tokens, so the gradients are the same.
    """
    hooks.install()
    connect()
    found = {}
    for counted in (1, 2, 10):
        model = Case("", layers=1, sequences=2, counted=counted)
        per_token = replace(model, per_token=True)
        norms = [
            train(case, 1)[0]["gradient norm"]
            for case in (model, per_token, replace(model, values=2), replace(per_token, values=2))
        ]
        assert norms == pytest.approx(norms[:1] * 4, rel=1e-5), norms
        found[counted] = norms[0]
    assert found[1] != pytest.approx(found[10], rel=1e-2)  # the mask acts


SCOPES = {  # type of loss -> share of padding in each of three sequences
    "aux_loss": (0.25, 0.5, 0.0),
    "seq_aux_loss": (0.5, 0.5, 0.5),  # Megatron takes all sequences to be as long
    "global_aux_loss": (0.25, 0.5, 0.0),
}


def padded(config: Any, mask: Tensor) -> dict[str, Tensor]:
    """Return what a layer of one model gives for padded sequences, and what it records."""
    record = recorded()
    for name in record:
        record[name].zero_()
    torch.manual_seed(1)
    layer = mtp_model(config).decoder.layers[0].mlp
    hidden = torch.randn(LENGTH, 3, HIDDEN, generator=torch.Generator().manual_seed(4))
    hidden.requires_grad_()
    output = layer(hidden, padding_mask=mask)[0]
    (output * ~mask.T.unsqueeze(2)).square().sum().backward()
    assert hidden.grad is not None
    found = {"output": output.detach(), "hidden": hidden.grad, **recorded()}
    return found | {"router": layer.router.weight.grad}


def padding_is_megatron_s() -> None:
    """Output, losses and gradients are those of Megatron's own block, where it is right."""
    cases = []
    for scope, shares in SCOPES.items():
        config = mtp_config(False, moe_router_load_balancing_type=scope, moe_z_loss_coeff=0.3)
        lengths = torch.tensor([[LENGTH * (1 - share)] for share in shares])
        cases.append((config, torch.arange(LENGTH) >= lengths))  # [B, S]
    without_the_plugin()
    one_rank()
    theirs = [{n: v.clone() for n, v in padded(*case).items()} for case in cases]
    hooks.install()
    for case, expected in zip(cases, theirs, strict=True):
        ours = padded(*case)
        there = ~case[1].T
        for name, value in expected.items():
            found = ours[name]
            if name in ("output", "hidden"):
                found, value = found[there], value[there]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6, msg=name)
        assert (ours["output"][~there] == 0).all()


def padding_counts_for_no_bias() -> None:
    """Expert bias moves by the load of unpadded tokens; recomputed layers see the mask too."""
    hooks.install()
    one_rank()
    config = transformer_config(Case("padded", layers=1, recompute="selective"))
    config.moe_router_score_function, config.moe_router_enable_expert_bias = "sigmoid", True
    (layer,) = layers_of(config, 1)
    mask = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [5]])
    hidden = torch.randn(LENGTH, 2, HIDDEN, requires_grad=True)
    layer(hidden, padding_mask=mask)[0].sum().backward()
    with torch.no_grad():
        chosen = (hidden @ layer.router.weight.T).topk(2).indices[~mask.T]
    expected = torch.bincount(chosen.flatten(), minlength=EXPERTS).float()
    assert torch.equal(layer.router.local_tokens_per_expert, expected)
    with pytest.raises(ConfigError, match=r"must be \[B, S\], here \[2, 16\].*got \[16, 2\]"):
        layer(hidden, padding_mask=mask.T)


CHECKS = {
    "padding": padding_is_megatron_s,
    "padding and expert bias": padding_counts_for_no_bias,
    "auxiliary losses' strength": one_strength,
    "a repeated layer's balancing loss": a_repeated_layer_counts_once,
    "a repeated layer's z-loss": a_repeated_layer_s_z_loss_counts_once_here_alone,
    "loads of multi-token prediction": loads_have_rows_of_their_own,
    "several models": models_do_not_mix,
}
