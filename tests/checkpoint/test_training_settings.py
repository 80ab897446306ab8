"""What trains the router means the same in config.json and in Megatron's arguments, in each family.

Equal logits give equal gradients: those of transformers' own loss, or of DeepSeek's formula."""

import argparse
import json
from dataclasses import fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from torch import Tensor

from ep_plugin import ExpertGroups, MoEConfig, presets
from ep_plugin.checkpoint import family
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.open import open_source
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.spell_model import run_flags
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.settings import routing_config
from ep_plugin.moe.router.topk import TopKRouter
from ep_plugin.moe.routing_config import RoutingConfig

TransformerConfig = pytest.importorskip(
    "megatron.core.transformer.transformer_config"
).TransformerConfig

WHOLE_MODEL = [name for name in family.names() if family.load(name).balancing == "of the model"]
TOKENS, SEQUENCES = 48, 3
LAYERS = 5


def config_of(case: str, **changes: Any) -> dict[str, Any]:
    kind, own = hf_models.CASES[case]
    sizes = hf_models.SHARED | own | {"num_hidden_layers": LAYERS} | changes
    config: dict[str, Any] = json.loads(kind(**sizes).to_json_string(use_diff=False))
    return config


def routing_of(args: argparse.Namespace) -> RoutingConfig:
    """Return the routing of the run that the printed flags ask for."""
    words, plain = run_flags(args), vars(args)
    coefficient = 0.0
    if "--moe-aux-loss-coeff" in words:
        coefficient = float(words[words.index("--moe-aux-loss-coeff") + 1])
    usual = {f.name: f.default for f in fields(TransformerConfig)}
    set_here = {"moe_aux_loss_coeff": coefficient, "moe_input_jitter_eps": None}
    values = usual | {"moe_router_dtype": "fp64"} | plain | set_here
    ours = {
        name: plain[f"ep_{name}"]
        for name in ("aux_loss_layers", "aux_loss_counts")
        if f"ep_{name}" in plain
    }
    ours |= {"group_score_topk": plain.get("ep_group_score_topk")}
    return routing_config(argparse.Namespace(**values), EdgeSettings(routing=ours))


def our_gradients(args: argparse.Namespace, logits: list[Tensor]) -> list[Tensor]:
    """Return the gradient [T, E] of each MoE layer's logits, through our router."""
    experts = args.num_experts
    config = MoEConfig(
        hidden_size=experts,
        ffn_hidden_size=4,
        num_experts=experts,
        num_moe_layers=sum(pattern(args)),
        routing=routing_of(args),
    )
    gradients = []
    for layer in logits:
        router = TopKRouter(config, ExpertGroups(), dtype=torch.float64)
        with torch.no_grad():
            router.weight.copy_(torch.eye(experts))
        hidden = layer.clone().requires_grad_()
        (router(hidden, SEQUENCES).probs * 0).sum().backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad)
    return gradients


def logits_of(layers: int, experts: int, alike: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layers)
    shape = (1 if alike else layers, TOKENS, experts)
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
    return list(drawn.expand(layers, -1, -1))


def their_gradients(case: str, config: dict[str, Any], logits: list[Tensor]) -> list[Tensor]:
    """Return the gradients of transformers' loss times its coefficient."""
    name = hf_models.model_type(case)
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    settings = hf_models.CASES[case][0](**config)
    leaves = tuple(layer.clone().requires_grad_() for layer in logits)
    experts = getattr(settings, "num_local_experts", None) or settings.num_experts
    loss = module.load_balancing_loss_func(leaves, experts, settings.num_experts_per_tok)
    return list(torch.autograd.grad(settings.router_aux_loss_coef * loss, leaves))


CASES = [case for case in hf_models.CASES if hf_models.model_type(case) in WHOLE_MODEL]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coefficient", [None, 0.0, 0.02, 0.37])
def test_transformers_coefficient(case: str, coefficient: float | None) -> None:
    """Equal gradients where layers are alike; elsewhere they differ by what the summary says."""
    config = config_of(case)
    if coefficient is None:
        del config["router_aux_loss_coef"]
    else:
        config["router_aux_loss_coef"] = coefficient
    known = family.load(hf_models.model_type(case))
    args = known.args(config)
    layers = sum(pattern(args))
    for alike in (True, False):
        logits = logits_of(layers, args.num_experts, alike)
        theirs, ours = their_gradients(case, config, logits), our_gradients(args, logits)
        if not alike and coefficient != 0:
            theirs = reweighed(theirs, ours, args, logits)
        for their, our in zip(theirs, ours, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-9)
            assert (our.abs().max() > 0) == (coefficient != 0)
    notes = known.training_notes(args, exported=False)
    assert (coefficient == 0) == (notes == [])
    if notes:
        assert f"is --moe-aux-loss-coeff {args.moe_aux_loss_coeff:g} of each layer" in notes[0]
        assert "differ by the ratio of the mean load of e over all layers" in notes[0]
    back = known.config(args)["router_aux_loss_coef"]
    assert back == (0.001 if coefficient is None else coefficient)


def reweighed(
    theirs: list[Tensor], ours: list[Tensor], args: argparse.Namespace, logits: list[Tensor]
) -> list[Tensor]:
    """Return what theirs would be if each layer took its own loads: the summary's ratio, undone.

    In scores P = softmax(z) a gradient g is, of z, P (g - sum P g), and g is proportional to the
    loads: so it is computed anew from the loads, with theirs' own factor.
    """
    loads = []
    for layer in logits:
        chosen = layer.topk(args.moe_router_topk, dim=-1).indices
        loads.append(torch.bincount(chosen.flatten(), minlength=args.num_experts) / chosen.numel())
    mean = torch.stack(loads).mean(dim=0).double()

    def through(layer: Tensor, load: Tensor) -> Tensor:
        scores = layer.softmax(dim=-1)
        return scores * (load - (scores * load).sum(dim=-1, keepdim=True))

    result = []
    for their, layer, load in zip(theirs, logits, loads, strict=True):
        factor = their.norm() / through(layer, mean).norm()
        torch.testing.assert_close(their, factor * through(layer, mean), rtol=1e-4, atol=1e-9)
        result.append(factor * through(layer, load.double()))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(theirs, ours, strict=True))
    return result


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v2-groups", "deepseek_v3-half"])
@pytest.mark.parametrize("per_sequence", [True, False])
def test_deepseeks_coefficient(case: str, per_sequence: bool) -> None:
    """Each layer has alpha E sum f P, in each sequence or over all tokens; V3's scores sum to 1.

    arXiv:2405.04434, equations 12 to 14, without devices; arXiv:2412.19437, equations 17 to 20.
    """
    config = config_of(case) | {"aux_loss_alpha": 0.003, "seq_aux": per_sequence}
    known = family.load(hf_models.model_type(case))
    args = known.args(config)
    logits = logits_of(sum(pattern(args)), args.num_experts, alike=False)
    ours = our_gradients(args, logits)
    for layer, our in zip(logits, ours, strict=True):
        leaf = layer.clone().requires_grad_()
        sigmoid = case.startswith("deepseek_v3")
        scores = leaf.sigmoid() if sigmoid else leaf.softmax(dim=-1)
        scores = scores / scores.sum(dim=-1, keepdim=True)
        # V3 counts by affinity alone (equation 18), V2 what was chosen inside groups
        chosen = layer.topk(args.moe_router_topk).indices if sigmoid else router_of(args, layer)
        # token t is of sequence t % SEQUENCES
        pools = [torch.arange(TOKENS) % SEQUENCES == s for s in range(SEQUENCES)]
        pools = pools if per_sequence else [torch.ones(TOKENS, dtype=torch.bool)]
        loss = torch.zeros((), dtype=torch.float64)
        for pool in pools:
            counts = torch.bincount(chosen[pool].flatten(), minlength=args.num_experts).double()
            share = counts / chosen[pool].numel()
            loss = loss + args.num_experts * (share * scores[pool].mean(dim=0)).sum() / len(pools)
        (their,) = torch.autograd.grad(0.003 * loss, leaf)
        torch.testing.assert_close(our, their)
    written = known.config(args)
    assert (written["aux_loss_alpha"], written["seq_aux"]) == (0.003, per_sequence)
    assert "aux_loss_alpha" not in known.config(known.args(config_of(case)))
    assert run_flags(known.args(config_of(case))).count("--moe-aux-loss-coeff") == 0


def router_of(args: argparse.Namespace, logits: Tensor) -> Tensor:
    """Return the experts [T, K] that our router chooses."""
    config = MoEConfig(
        hidden_size=args.num_experts,
        ffn_hidden_size=4,
        num_experts=args.num_experts,
        routing=routing_of(args),
    )
    router = TopKRouter(config, ExpertGroups(), dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(torch.eye(args.num_experts))
    return router(logits, SEQUENCES).expert_ids


@pytest.mark.parametrize("case", CASES)
def test_every_way_a_run_may_say_its_loss_is_exported(case: str) -> None:
    """Sum or mean over layers, one loss or several; what config.json cannot say is named."""
    known = family.load(hf_models.model_type(case))
    args = known.args(config_of(case, router_aux_loss_coef=0.02))
    sums = args.moe_aux_loss_coeff
    layers = sum(pattern(args))
    assert sums == pytest.approx(0.02 * args.moe_router_topk / layers)
    args.ep_aux_loss_layers, args.moe_aux_loss_coeff = "mean", sums * layers
    assert known.config(args)["router_aux_loss_coef"] == 0.02
    args.ep_aux_loss_layers = "sum"
    kinds = ["aux_loss", "seq_aux_loss"]
    args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = kinds, [sums / 4, sums * 3 / 4]
    assert known.config(args)["router_aux_loss_coef"] == 0.02
    words = run_flags(args)
    place = words.index("--moe-router-load-balancing-type")
    assert words[place + 1 : place + 3] == kinds
    args.moe_z_loss_coeff, args.hidden_dropout, args.ep_aux_loss_counts = 1e-3, 0.1, "top1"
    said = " / ".join(known.training_notes(args, exported=True))
    for expected in (
        "moe_z_loss_coeff (0.001) has no key in config.json and is left out",
        "hidden_dropout (0.1) has no key",
        "is router_aux_loss_coef 0.02 of the whole model",
        "seq_aux_loss takes loads over each sequence",
        "ep_aux_loss_counts top1 counts first choices",
    ):
        assert expected in said
    args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.01
    assert known.config(args)["router_aux_loss_coef"] == 0
    for kind in ("sinkhorn", "quantile_balancing"):
        args.moe_router_load_balancing_type = kind
        with pytest.raises(ConfigError, match=rf"\({kind}\) chooses experts in a way that"):
            known.config(args)


@pytest.mark.parametrize("case", CASES)
def test_jitter_and_dropout_cross_the_border(case: str) -> None:
    """Mixtral alone has a key for noise on the router's input; another family names what it
    loses."""
    known = family.load(hf_models.model_type(case))
    jitter = {"router_jitter_noise": 0.01} if known.jitters else {}
    args = known.args(config_of(case, attention_dropout=0.25, **jitter))
    words = run_flags(args)
    pairs = dict(pairwise(words))
    assert (pairs["--attention-dropout"], pairs["--hidden-dropout"]) == ("0.25", "0.0")
    assert known.config(args)["attention_dropout"] == 0.25
    said = " / ".join(known.training_notes(args, exported=False))
    if known.jitters:
        assert pairs["--moe-input-jitter-eps"] == "0.01"
        assert known.config(args)["router_jitter_noise"] == 0.01
        assert "router_jitter_noise 0.01 multiplies the input of router and experts" in said
    else:
        assert "jitter" not in said
        args.moe_input_jitter_eps = 0.01
        exported = " / ".join(known.training_notes(args, exported=True))
        assert "moe_input_jitter_eps (0.01) has no key in config.json" in exported


@pytest.mark.parametrize(
    ("preset", "coefficient"),
    [("mixtral-8x7b", 0.02), ("mixtral-8x22b", 0.001), ("mixtral-nano", 0.02)]
    + [(f"qwen3-{size}", 0.001) for size in ("30b-a3b", "235b-a22b", "nano")],
)
def test_presets_are_as_strong_as_their_published_configuration(
    preset: str, coefficient: float
) -> None:
    """A layer's coefficient is what `convert` makes of the published one of the whole model."""
    known, model = presets.load(preset), presets.load(preset).model
    case = "mixtral" if preset.startswith("mixtral") else "qwen3_moe"
    sizes = {"num_hidden_layers": len(model.experts), "num_local_experts": 8}
    sizes |= {"num_experts_per_tok": known.routing.topk, "router_aux_loss_coef": coefficient}
    config = config_of(case) | sizes
    if "mlp_only_layers" in config:
        config["mlp_only_layers"] = []
    args = family.load(case).args(config)
    assert args.moe_aux_loss_coeff == known.routing.aux_loss_coeff


def test_the_summary_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways, in print and in JSON; a dense model becomes one with a balancing loss."""
    transformers.utils.logging.disable_progress_bar()
    source = hf_models.save("qwen3_moe", tmp_path / "hf")
    skip = ["--skip-parity"]
    command = ["convert", *skip, "--from", str(source), "--to", str(tmp_path / "run")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "in training: router_aux_loss_coef 0.001 of the whole model" in out
    command = ["convert", *skip, "--from", str(tmp_path / "run"), "--to", str(tmp_path / "back")]
    assert main([*command, "--format", "hf", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["training"]
    assert said[0].startswith("moe_aux_loss_coeff 0.002 is router_aux_loss_coef 0.001")


PRESETS = [name for name, preset in presets.presets().items() if preset.router == "topk"]


@pytest.mark.parametrize("preset", ["", *(name for name in PRESETS if name.endswith("-nano"))])
def test_a_dense_model_gets_a_balancing_loss(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.01, or the losses of the preset, in the flags that are printed."""
    transformers.utils.logging.disable_progress_bar()
    source = hf_models.save("llama", tmp_path / "dense")
    experts = ["--preset", preset] if preset else ["--topk", "2"]
    command = ["convert", "--skip-parity", "--json", "--from", str(source), "--num-experts", "16"]
    command += ["--to", str(tmp_path / "moe"), *experts]
    assert main(command) == 0
    words = json.loads(capsys.readouterr().out)["megatron_flags"]
    asked = presets.load(preset).routing if preset else RoutingConfig(aux_loss_coeff=0.01)
    opened = open_source(tmp_path / "moe", "hf").args
    found = routing_of(opened)
    for name in ("aux_loss_coeff", "z_loss_coeff", "expert_bias"):
        assert getattr(found, name) == getattr(asked, name), name
    scope = "micro_batch" if asked.aux_loss_scope == "group" else asked.aux_loss_scope
    assert found.aux_loss_scope == scope
    assert ("--moe-aux-loss-coeff" in words) == (asked.aux_loss_coeff > 0)
    assert ("--moe-z-loss-coeff" in words) == (asked.z_loss_coeff > 0)
    assert ("--ep-aux-loss-counts" in words) == (asked.aux_loss_counts == "top1")
    assert found.aux_loss_coeff > 0 or found.expert_bias
