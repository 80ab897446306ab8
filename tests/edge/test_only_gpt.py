"""Flags that act in a GPT are refused beside a pattern, or act in its HybridModel too."""

import random
from importlib.util import find_spec
from typing import Any

import pytest
from parsed_hybrid import EXPERTS, parsed

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.checks import check_arguments, settings_from_args
from ep_plugin.megatron.arguments.in_flags import in_flags
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.cpu.local_layers import local_stack

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        find_spec("megatron.core.models.hybrid") is None, reason="HybridModels are of 0.18 on"
    ),
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]
PATTERN = ("--hybrid-layer-pattern", "*E*-")
UNREAD = {
    "--use-rope-scaling": ((), "which does not read it; leave it out"),
    "--heterogeneous-layers-config-path": (("layers.json",), "which does not read it"),
    "--position-embedding-type": (("mrope",), "use --position-embedding-type rope"),
    "--multi-latent-attention": ((), "leave it out, or --hybrid-layer-pattern '+E+-'"),
    "--linear-attention-freq": (("2",), "each G is a gated delta net; leave it out"),
    "--experimental-attention-variant": (("dsa",), "in which it is D; leave it out"),
    "--no-rope-freq": (("2",), "none that it picks is attention; use --no-rope-freq '[0,0,1,0]'"),
}


def refused(*flags: str) -> str | None:
    args = parsed(*flags)
    try:
        check_arguments(args, settings_from_args(args))
    except ConfigError as error:
        return error.spelled(in_flags(flags))
    return None


@pytest.mark.parametrize("flag", UNREAD)
def test_what_no_hybrid_model_reads_is_refused(flag: str) -> None:
    values, message = UNREAD[flag]
    said = refused(*PATTERN, *EXPERTS, flag, *values) or ""
    assert said.startswith(flag)
    assert message in said
    assert refused(*PATTERN, *EXPERTS) is None


def test_what_a_pattern_has_layers_for_is_read() -> None:
    latent = ("--hybrid-layer-pattern", "+E+-")
    assert refused(*latent, *EXPERTS, "--multi-latent-attention") is None


@pytest.mark.parametrize("seed", range(40))
def test_numbers_of_layers_pick_an_attention_or_are_refused_with_a_list_that_does(
    seed: int,
) -> None:
    draw = random.Random(seed)
    pattern = "*" + "".join(draw.choices("*E-", k=draw.randrange(1, 7))) + "E"
    flag, entry = draw.choice((("--no-rope-freq", 1), ("--window-attn-skip-freq", 0)))
    number = draw.randrange(1, len(pattern) + 1)
    window = ("--window-size", "4,0") if entry == 0 else ()
    flags = ("--hybrid-layer-pattern", pattern, *EXPERTS, *window)
    said = refused(*flags, flag, str(number))
    picked = pattern[number - 1 :: number]
    assert (said is None) == ("*" in picked)
    if said is not None:
        listed = said.rpartition("'[")[2].rstrip("']")
        assert {pattern[at] for at, one in enumerate(listed.split(",")) if one == str(entry)} == {
            "*"
        }
        assert refused(*flags, flag, f"[{listed}]") is None


def test_a_preset_s_layers_beside_a_pattern_are_refused_with_what_goes() -> None:
    flags = ("--hybrid-layer-pattern", "*E*-", "--ep-preset", "mixtral-8x7b")
    assert "use --moe-layer-freq 1 beside them" in (refused(*flags) or "")
    assert refused(*flags, "--moe-layer-freq", "1") is None


@pytest.mark.parametrize("pattern", ["M*-", "G*-", "D-", "*-/*-"])
def test_a_dense_pattern_has_its_layers_on_the_cpu_or_is_refused(pattern: str) -> None:
    assert "on the CPU use" in (refused("--hybrid-layer-pattern", pattern) or "")
    assert refused("--hybrid-layer-pattern", "*-+-") is None


@pytest.mark.parametrize("flag", ["qk_layernorm", "qk_l2_norm"])
def test_norms_of_queries_and_keys_are_in_local_layers(flag: str) -> None:
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_config import TransformerConfig

    def norms(**settings: Any) -> list[Any]:
        sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
        stack = local_stack(TransformerConfig(**sizes, **settings))
        parts = stack.submodules.attention_layer.submodules.self_attention.submodules
        return [parts.q_layernorm, parts.k_layernorm]

    assert norms() == [IdentityOp, IdentityOp]
    assert IdentityOp not in norms(**{flag: True})
