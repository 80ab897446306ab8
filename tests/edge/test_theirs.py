"""Every setting of Megatron's acts, is refused, or has a reason why it does neither."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from list_settings import to_decide
from releases import RELEASES, environment

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.theirs import BESIDE, BY_FIELD, check
from ep_plugin.megatron.arguments.theirs_next import NEXT
from ep_plugin.megatron.arguments.theirs_page import page
from ep_plugin.megatron.arguments.theirs_releases import FLAGS
from ep_plugin.megatron.arguments.theirs_releases import RELEASES as RELEASES_OF
from ep_plugin.megatron.arguments.theirs_table import THEIRS, Theirs
from ep_plugin.megatron.settings import EdgeSettings

PAGE = Path(__file__).parents[2] / "docs" / "megatron-flags.md"
LIST = Path(__file__).parents[1] / "helpers" / "list_settings.py"
# What makes a setting's `when` true, beside the value that is to be refused.
ASKED: dict[str, Any] = {
    "recompute_granularity": "selective",
    "fine_grained_activation_offloading": True,
    "fp8": "e4m3",
    "cuda_graph_impl": "local",
    "moe_expert_capacity_factor": 1.0,
}
NEEDS = {
    "moe_token_drop_policy": ("moe_expert_capacity_factor",),
    "fp8_recipe": ("fp8",),
    "fp8_wgrad": ("fp8",),
    "fp8_param": ("fp8",),
    "fp8_param_gather": ("fp8",),
    "first_last_layers_bf16": ("fp8",),
    "recompute_modules": ("recompute_granularity",),
    "offload_modules": ("fine_grained_activation_offloading",),
    "cuda_graph_modules": ("cuda_graph_impl",),
    "cuda_graph_scope": ("cuda_graph_impl",),
    "cuda_graph_scope_deprecated": ("cuda_graph_impl",),
}
REFUSED = [row for row in (*THEIRS, *NEXT) if row.effect == "refused"]
SOME_LEGAL = [row for row in THEIRS if row.effect == "acts" and row.legal]


def of(kind: str, row: Theirs, value: Any, **more: Any) -> SimpleNamespace:
    """Return settings of an MoE model with one value, as arguments or as a configuration."""
    experts = "num_experts" if kind == "arguments" else "num_moe_experts"
    asked = {name: ASKED[name] for name in NEEDS.get(row.field, ()) if value is not None}
    return SimpleNamespace(**{experts: 4, **asked, row.field: value, **more})


def listed() -> dict[str, Any]:
    """Return what each release has, all asked at once."""
    running = {
        version: subprocess.Popen(
            [sys.executable, str(LIST)],
            env=environment(version),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for version in RELEASES
    }
    said = {version: process.communicate() for version, process in running.items()}
    for version, process in running.items():
        assert process.returncode == 0, said[version][1][-3000:]
    return {version: json.loads(out.splitlines()[-1]) for version, (out, _) in said.items()}


@pytest.fixture(scope="module")
def releases() -> dict[str, Any]:
    try:
        return listed()
    except subprocess.CalledProcessError:
        pytest.skip("not every release of megatron-core can be installed here")


@pytest.mark.megatron
@pytest.mark.newest
def test_every_setting_of_every_release_has_a_row(releases: dict[str, Any]) -> None:
    for version, found in releases.items():
        missing = to_decide(found) - {*BY_FIELD}
        assert not missing, f"{version}: {sorted(missing)}"


@pytest.mark.megatron
@pytest.mark.newest
def test_every_row_is_a_setting_of_some_release(releases: dict[str, Any]) -> None:
    known = {name for found in releases.values() for name in (*found["fields"], *found["flags"])}
    assert not {row.field for row in THEIRS} - known
    assert not {row.field for row in NEXT} & known
    flags = {
        name: names for found in releases.values() for name, (names, _) in found["flags"].items()
    }
    refused = [row for row in REFUSED if row not in NEXT]
    for row in (*refused, *SOME_LEGAL, *(BY_FIELD[field] for field, _, _ in BESIDE)):
        assert row.name in flags[row.field] if row.field in flags else row.flag == "", row


def releases_of(field: str, releases: dict[str, Any]) -> str:
    """Return the releases that have a setting, as the page says it; "" for all."""
    on_17 = field in releases["0.17.1"]["flags"] and field not in releases["0.19.2"]["fields"]
    has = [
        version.rpartition(".")[0]
        for version, found in releases.items()
        if field in found["fields"] or field in found["flags"] or (not found["flags"] and on_17)
    ]
    if len(has) == len(releases):
        return ""
    last = "" if len(has) == 1 else " on" if has[-1] == "0.19" else f" to {has[-1]}"
    return f"{has[0]}{last}"


@pytest.mark.megatron
@pytest.mark.newest
def test_the_page_says_where_settings_are_and_how_they_are_typed(releases: dict[str, Any]) -> None:
    for row in THEIRS:
        assert RELEASES_OF.get(row.field, "") == releases_of(row.field, releases), row.field
        names = [
            name for found in releases.values() for name in found["flags"].get(row.field, ((),))[0]
        ]
        typed = FLAGS.get(row.field, (f"--{row.field.replace('_', '-')}",))
        assert (tuple(dict.fromkeys(names)) or (row.field,)) == typed, row.field


def test_the_page_is_what_the_table_prints() -> None:
    assert PAGE.read_text() == page(), (
        "print it anew: python -m ep_plugin.megatron.arguments.theirs_page > docs/megatron-flags.md"
    )
    for row in THEIRS:
        assert page().count(f"`{FLAGS.get(row.field, (row.name,))[0]}`"), row.field


@pytest.mark.megatron
@pytest.mark.newest
@pytest.mark.parametrize("version", RELEASES)
def test_every_way_to_shard_parameters_is_refused(version: str, releases: dict[str, Any]) -> None:
    """Those of a parser; 0.16 has none in its wheel, and a configuration has no such field."""
    ways = {"use_megatron_fsdp", "use_torch_fsdp2"}
    found = {name for name in releases[version]["flags"] if re.match(r"use_\w*fsdp", name)}
    assert found == (ways if releases[version]["flags"] else set())
    assert not ways & {*releases[version]["fields"]}
    for way in sorted(ways):
        with pytest.raises(ConfigError, match=f"^--{way.replace('_', '-')} .*; use --use-dist"):
            check(SimpleNamespace(num_experts=4, **{way: True}))
        check(SimpleNamespace(num_experts=None, **{way: True}))


@pytest.mark.megatron
@pytest.mark.newest
def test_a_plain_model_is_never_refused(releases: dict[str, Any]) -> None:
    assert {v: (found["config"], found["args"]) for v, found in releases.items()} == dict.fromkeys(
        RELEASES, (None, None)
    )


def test_no_setting_has_two_rows() -> None:
    assert len(BY_FIELD) == len(THEIRS) + len(NEXT)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.field)
@pytest.mark.parametrize("kind", ["arguments", "configuration"])
def test_what_is_refused_is_named(row: Theirs, kind: str) -> None:
    given = False if True in row.off else 2
    with pytest.raises(ConfigError) as refusal:
        check(of(kind, row, given))
    said = str(refusal.value)
    assert said.startswith(row.name if kind == "arguments" else f"{row.field}={given}")
    assert "; use " in said or "; leave it out" in said
    for off in row.off:
        check(of(kind, row, off))
    check(SimpleNamespace(**{row.field: given}))  # without experts


@pytest.mark.parametrize("row", SOME_LEGAL, ids=lambda row: row.field)
@pytest.mark.parametrize("kind", ["arguments", "configuration"])
def test_other_values_than_the_legal_ones_are_refused(row: Theirs, kind: str) -> None:
    for value in (None, *row.legal):
        asked = {"moe_grouped_gemm": True, "gated_linear_unit": value != "relu"}
        if value == "shared_experts":  # with the whole block, or not at all
            asked |= SHARED
            check(of(kind, row, ["moe", value], **asked))
        else:
            check(of(kind, row, value, **asked))
    check(of(kind, row, [row.legal[0]], gated_linear_unit=True))
    for value in ("another", ["another"], [row.legal[0], "another"]):
        with pytest.raises(ConfigError, match=rf"^{row.name}|^{row.field}=.*another.*; use "):
            check(of(kind, row, value))


def squared_relu(x: float) -> float:
    """Stand in for Megatron's."""
    return max(x, 0) ** 2


SHARED = {"moe_shared_expert_intermediate_size": 64}
TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "a loss twice": (
        {"moe_router_load_balancing_type": ["aux_loss"] * 2, "moe_aux_loss_coeff": [0.1, 0.1]},
        r"\(aux_loss aux_loss\) must be losses that differ, .*; use",
    ),
    "no loss beside one": (
        {"moe_router_load_balancing_type": ["aux_loss", "none"], "moe_aux_loss_coeff": [0.1, 0.1]},
        r"\(aux_loss none\) must be losses that differ, .*; use",
    ),
    "two losses and one coefficient": (
        {
            "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
            "moe_aux_loss_coeff": 0.1,
        },
        r"--moe-aux-loss-coeff \(0.1\) must be a number for each",
    ),
    "two coefficients": (
        {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [1e-2, 1e-3]},
        r"\(0.01 0.001\) must be a number for each",
    ),
    "a capacity beside quantiles": (
        {
            "moe_router_load_balancing_type": ["quantile_balancing"],
            "moe_expert_capacity_factor": 1.0,
        },
        r"--moe-expert-capacity-factor \(1.0\) does not go with .*; use",
    ),
    "a policy without a capacity": (
        {"moe_token_drop_policy": "position"},
        r"--moe-token-drop-policy \(position\) says who goes .*; use --moe-expert-capacity-factor",
    ),
    "a gate beside biases": (
        {**SHARED, "moe_shared_expert_gate": True, "add_bias_linear": True},
        "--moe-shared-expert-gate needs linear layers without bias; use --disable-bias-linear",
    ),
    "mixed rows beside biases": (
        {**SHARED, "moe_shared_expert_glu_interleave_size": 32, "add_bias_linear": True},
        r"size \(32\) needs linear layers without bias; use --disable-bias-linear",
    ),
    **{
        f"{field} without a shared expert": (
            {field: value},
            f"^--{field.replace('_', '-')} .*, and there is none; use --moe-shared-expert-interm",
        )
        for field, value in (
            *(("moe_shared_expert_overlap", True), ("moe_shared_expert_gate", True)),
            ("use_grouped_gemm_for_shared_expert", True),
            ("moe_shared_expert_glu_interleave_size", 32),
        )
    },
    "parts to move and none that moves them": (
        {"offload_modules": ["core_attn", "attn_norm"]},
        r"--offload-modules \(core_attn attn_norm\) is read with --fine-.*; use --fine-grained",
    ),
    "moving without parts": (
        {"fine_grained_activation_offloading": True, "offload_modules": []},
        "^--fine-grained-activation-offloading moves what .*; use --offload-modules core_attn",
    ),
    "a stream for exchanges of one micro-batch": (
        {"high_priority_a2a_comm_stream": True},
        "^--high-priority-a2a-comm-stream is about two .*; use --ep-overlap two_batch",
    ),
    "two backends": (
        {"moe_enable_deepep": True, "moe_flex_dispatcher_backend": "hybridep"},
        "^--moe-enable-deepep and another --moe-flex-dispatcher-backend contradict",
    ),
    "a mean of no quantiles": (
        {"moe_router_quantile_balancing_ema": 0.5, "moe_router_load_balancing_type": "aux_loss"},
        r"ema \(0.5\) is about the bias of quantile balancing, and there is none; use --moe-router",
    ),
    "the activation of experts with biases": (
        {"recompute_activations": True, "recompute_modules": ["moe_act"], "add_bias_linear": True},
        r"--recompute-modules \(moe_act\) has moe_act, and experts with biases",
    ),
    "a dense block of biases": (
        {
            **{"recompute_activations": True, "recompute_modules": ["mlp", "core_attn"]},
            **{"add_bias_linear": True, "moe_layer_freq": [0, 1]},
        },
        r"--recompute-modules \(mlp core_attn\) has mlp, .* never ends; use --disable-bias-linear",
    ),
    "a shared expert alone": (
        {**SHARED, "recompute_granularity": "selective", "recompute_modules": ["shared_experts"]},
        r"has shared_experts, .*; use --recompute-modules moe",
    ),
    "no shared expert": (
        {"recompute_granularity": "selective", "recompute_modules": ["moe", "shared_experts"]},
        r"has shared_experts, and this model has none; use --recompute-modules moe",
    ),
    "experts one by one": (
        {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
        r"has moe_act, .*; use --moe-grouped-gemm",
    ),
    "a layernorm before a shared expert in FP8": (
        {
            **SHARED,
            "fp8": "e4m3",
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "layernorm"],
        },
        r"\(core_attn layernorm\) has layernorm, .*; use --recompute-modules moe",
    ),
}


@pytest.mark.parametrize("together", TOGETHER)
def test_settings_that_do_not_go_together(together: str) -> None:
    given, said = TOGETHER[together]
    with pytest.raises(ConfigError, match=said):
        check(SimpleNamespace(num_experts=4, **given))


def test_a_part_within_the_whole_layer_is_recomputed_with_it() -> None:
    parts = ["moe", "moe_act", "shared_experts"]
    check(
        SimpleNamespace(
            num_experts=4,
            add_bias_linear=True,
            moe_grouped_gemm=True,
            recompute_activations=True,
            recompute_modules=parts,
            **SHARED,
        )
    )


@pytest.mark.parametrize(
    "without",
    [{"add_bias_linear": False}, {"moe_layer_freq": 1}, {"recompute_modules": ["moe"]}],
)
def test_dense_blocks_are_recomputed_where_they_end(without: dict[str, Any]) -> None:
    given: dict[str, Any] = {"recompute_activations": True, "recompute_modules": ["mlp"]}
    given |= {"add_bias_linear": True, "moe_layer_freq": [0, 1]}
    with pytest.raises(ConfigError, match="never ends"):
        check(SimpleNamespace(num_experts=4, **given))
    check(SimpleNamespace(num_experts=4, **given | without))


def test_an_activation_has_its_name_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"^activation_func=squared_relu is .* geglu_tanh, gelu"):
        check(SimpleNamespace(num_moe_experts=4, activation_func=squared_relu))
    pair = SimpleNamespace(__name__="relu")
    with pytest.raises(
        ConfigError, match=r"^gated_linear_unit=True and activation_func are a pair"
    ):
        check(SimpleNamespace(num_moe_experts=4, activation_func=pair, gated_linear_unit=True))


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({"squared_relu": True}, {"expert_activation": "gelu"}),
        ({"quick_geglu": True}, {"expert_activation": "swiglu"}),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, {"fp8": "blockwise"}),
        ({"fp8": "hybrid", "fp8_wgrad": False}, {"fp8_wgrad": "bf16"}),
        ({"fp8": "hybrid", "first_last_layers_bf16": True}, {"fp8": "off"}),
        ({"fp8": "hybrid", "fp8_param_gather": True}, {"fp8": "off"}),
        ({"te_precision_config_file": "recipes.yaml"}, {"fp8": "rowwise"}),
        ({"activation_func_fp8_input_store": True}, {"save": "fp8"}),
    ],
    ids=lambda part: next(reversed(part)),
)
def test_a_flag_of_ours_takes_the_place(given: dict[str, Any], own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--ep-"):
        check(SimpleNamespace(num_experts=4, **given))
    flags = {f"ep_{name}": value for name, value in own.items()}
    check(SimpleNamespace(num_experts=4, **given, **flags))
    check(SimpleNamespace(num_experts=4, **given), EdgeSettings(**own))
