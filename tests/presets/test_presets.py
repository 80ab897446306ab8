"""Presets: parameter tables of the papers, recomputed; the table of the document; the command."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ep_plugin.cli import main
from ep_plugin.commands.numbers import short_count
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.spell import megatron_arguments
from ep_plugin.presets import active_params, load, presets, total_params
from ep_plugin.presets._model import Model, Preset

TABLES = Path(__file__).parents[2] / "docs" / "presets.md"
# preset -> (total, active) in billions, to the digits given; recomputed from each paper's shapes
TABLE = {
    "switch-base-128": ("7.415", "0.2241"),
    "switch-large-128": ("26.31", "0.74"),
    "switch-xxl-128": ("394.7", "11.1"),
    "switch-c-2048": ("1571.3", "1.7"),
    "glam-0.1b-64e": ("1.908", "0.1523"),
    "glam-1.7b-32e": ("13.96", "1.878"),
    "glam-1.7b-64e": ("26.84", "1.879"),
    "glam-1.7b-128e": ("52.62", "1.881"),
    "glam-1.7b-256e": ("104.16", "1.884"),
    "glam-8b-64e": ("142.9", "9.799"),
    "glam-64b-64e": ("1162", "96.605"),
    "ds-125m-moe64": ("1.911", "0.1256"),
    "ds-350m-moe128": ("13.150", "0.3575"),
    "ds-1.3b-moe128": ("52.472", "1.319"),
    "ds-350m-prmoe-32-64": ("4.117", "0.4571"),
    "ds-1.3b-prmoe-64-128": ("31.392", "1.720"),
    "ds-350m-mos-l21": ("3.542", "0.4025"),
    "ds-1.3b-mos-l21": ("26.944", "1.502"),
    "ds-infer-107b": ("107.1", "2.66"),
    "ds-infer-349b": ("349.2", "8.28"),
    "ds-infer-1t": ("1047.4", "24.6"),
    "ds-infer-2t": ("2024.6", "47.2"),
    "st-moe-32b": ("269.1", "35.1"),
    "deepseek-v3": ("671.0", "37.55"),
    "mixtral-8x7b": ("46.70", "12.88"),
    "mixtral-8x22b": ("140.6", "39.2"),
    "qwen3-30b-a3b": ("30.53", "3.35"),
    "qwen3-235b-a22b": ("235.1", "22.2"),
}
PUBLISHED = {  # preset -> the paper's total in billions
    "switch-base-128": 7.41, "switch-large-128": 26, "switch-xxl-128": 395, "switch-c-2048": 1571,
    "glam-0.1b-64e": 1.9, "glam-1.7b-64e": 27, "glam-1.7b-128e": 53, "glam-1.7b-256e": 105,
    "glam-8b-64e": 143, "glam-137b-dense": 137,
    "ds-350m-moe128": 13, "ds-1.3b-moe128": 52, "ds-1.3b-prmoe-64-128": 31,
    "ds-350m-mos-l21": 3.5, "ds-1.3b-mos-l21": 27, "ds-infer-107b": 107.7, "ds-infer-349b": 349,
    "ds-infer-1t": 1046.9, "ds-infer-2t": 2024, "st-moe-32b": 269, "deepseek-v3": 671,
    "mixtral-8x7b": 46.7, "mixtral-8x22b": 141, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235,
}  # fmt: skip
MISPRINTED = {  # preset -> (printed total in billions, what the printed shape gives)
    "glam-1.7b-32e": (20, "table 4's shape has 13.96B"),
    "ds-350m-prmoe-32-64": (4, "printed with one digit; 4.117B"),
    "glam-64b-64e": (1200, "printed with two digits, 1.2T; 96.6B active is exact"),
    "gshard-600b": (600, "618B in experts alone"),
}


@pytest.mark.parametrize("name", TABLE)
def test_recomputed_tables(name: str) -> None:
    for count, text in zip((total_params, active_params), TABLE[name], strict=True):
        digits = len(text.partition(".")[2])
        assert f"{count(load(name)) / 1e9:.{digits}f}" == text, count.__name__


def test_totals_are_the_papers_to_two_percent() -> None:
    for name, billions in PUBLISHED.items():
        assert total_params(load(name)) / 1e9 == pytest.approx(billions, rel=0.02), name
    for name, (billions, why) in MISPRINTED.items():
        assert total_params(load(name)) / 1e9 != pytest.approx(billions, rel=0.02), why


def test_totals_printed_as_integers_are_exact() -> None:
    """Three dense siblings of GLaM in Lingvo's configurations, and DeepSeek-V3."""
    assert total_params(load("deepseek-v3")) == 671_026_419_200
    dense = load("glam-137b-dense")
    assert total_params(dense) == 137_702_416_384
    trillion = replace(dense.model, hidden=16384, heads=256, dense_ffn=131072, experts=(0,) * 128)
    assert total_params(with_model(dense, trillion)) == 1_100_041_175_040
    ungated = replace(
        dense.model,
        hidden=12288,
        heads=96,
        dense_ffn=49152,
        dense_activation="gelu",
        experts=(0,) * 96,
        positions="learned",
        max_positions=2048,
    )
    assert total_params(with_model(dense, ungated)) == 174_366_928_896


def with_model(preset: Preset, model: Model) -> Preset:
    return replace(preset, model=model)


def with_experts(like: str, **changes: Any) -> Preset:
    """A row of a paper's table that is no preset: `like` with other shapes."""
    preset = load(like)
    return with_model(preset, replace(preset.model, **changes))


def glam(layers: int, hidden: int, ffn: int, heads: int, head_dim: int, **changes: Any) -> Preset:
    shape = {"hidden": hidden, "dense_ffn": ffn, "heads": heads, "head_dim": head_dim}
    return with_experts("glam-137b-dense", experts=(0,) * layers, **shape, **changes)


GEGLU = {"dense_ffn": 2816, "expert_ffn": 2816}
GEGLU |= {"dense_activation": "geglu", "expert_activation": "geglu"}
SWITCH = {  # experts of Switch-Base -> (total, the paper's in billions, tables 6, 7 and 9)
    0: (222_903_552, 0.223),
    16: (1_072_397_568, 1.1),
    32: (1_978_514_688, 2.0),
    64: (3_790_748_928, 3.8),
    256: (14_664_154_368, 14.7),
}
ROWS = {  # a row that is no preset -> (preset, total in billions)
    "GLaM 0.1B": (glam(12, 768, 3072, 12, 64), "0.1378"),
    "GLaM 0.1B, vocabulary 256,000": (glam(12, 768, 3072, 12, 64, vocab=256_000), "0.3099"),
    "GLaM 1.7B": (glam(24, 2048, 8192, 16, 128), "1.676"),
    "GLaM 8B": (glam(32, 4096, 16384, 32, 128), "8.721"),
    "GLaM 64B/64E, vocabulary 32,000": (with_experts("glam-64b-64e", vocab=32_000), "1159.9"),
    "Switch-Large, GEGLU": (with_experts("switch-large-128", **GEGLU), "27.12"),
    "Switch-XXL, the 64 experts printed": (
        with_experts("switch-xxl-128", experts=(0, 64) * 12, encoder_experts=(0, 64) * 12),
        "201.4",
    ),
    "DeepSpeed-MoE table 6, 24B with the 40 layers printed": (
        with_experts("ds-infer-1t", experts=(0, 128) * 20),
        "1396",
    ),
    "DeepSpeed-MoE table 6, 8B with the 30 layers printed": (
        with_experts("ds-infer-349b", experts=(0, 128) * 15),
        "262.0",
    ),
}


@pytest.mark.parametrize("experts", SWITCH)
def test_switch_base_with_other_numbers_of_experts(experts: int) -> None:
    every_second = (0, experts) * 6
    row = with_experts("switch-base-128", experts=every_second, encoder_experts=every_second)
    total, published = SWITCH[experts]
    assert total_params(row) == total
    assert total / 1e9 == pytest.approx(published, rel=0.03)  # printed with two digits


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_no_presets(name: str) -> None:
    preset, text = ROWS[name]
    digits = len(text.partition(".")[2])
    assert f"{total_params(preset) / 1e9:.{digits}f}" == text


def test_deepspeed_parameters_outside_experts_and_embeddings() -> None:
    """805M, the size of 1.3B+MoE-128 that every GPU holds at inference, by its tutorial."""
    preset = load("ds-1.3b-moe128")
    model = preset.model
    one = 2 * model.hidden * model.expert_ffn + model.expert_ffn + model.hidden
    routers = sum(model.experts) * model.hidden
    embeddings = (model.vocab + model.max_positions) * model.hidden
    held = active_params(preset) - 12 * one - routers - embeddings
    assert held / 1e6 == pytest.approx(805, abs=1)  # with 0.5M of biases and norms


def test_gshards_experts_alone() -> None:
    """618B of 600B are experts: half of 36 layers, 2048 experts of two matrices."""
    model = load("gshard-600b").model
    layers = sum(map(bool, model.experts + model.encoder_experts))
    assert layers * 2048 * 2 * model.hidden * model.expert_ffn == pytest.approx(618e9, rel=1e-3)


def test_capacity_of_experts_costs_no_computation() -> None:
    """GLaM 1.7B with 32 to 256 experts: active parameters grow by the router alone."""
    sizes = (32, 64, 128, 256)
    active = [active_params(load(f"glam-1.7b-{experts}e")) for experts in sizes]
    model = load("glam-1.7b-64e").model
    gate = model.hidden * sum(map(bool, model.experts))
    assert [a - active[0] for a in active] == [gate * (e - 32) for e in sizes]


def part_of_a_layer(preset: Preset) -> float:
    """Return the coefficient of a layer for 1 of the whole model, as transformers counts."""
    return preset.routing.topk / sum(map(bool, preset.model.experts))


def test_every_preset_has_a_nano_twin_with_its_routing() -> None:
    """Same routing keys at a size for tests; only sizes of groups may differ."""
    sizes = ("group_tokens", "topk", "num_groups", "group_topk", "min_capacity")
    sizes += ("capacity_factor", "eval_capacity_factor")
    known = presets()
    nanos = {name: preset for name, preset in known.items() if name.endswith("-nano")}
    assert len(nanos) == 11
    twins = {}
    for name, nano in nanos.items():
        (like,) = re.findall(r"the routing of (\S+) at a size for tests", nano.source)
        twins.setdefault(known[like].system, []).append(name)
        scale = 1.0
        if known[like].system in ("Mixtral", "Qwen3 MoE"):  # a coefficient of the whole model
            scale = part_of_a_layer(nano) / part_of_a_layer(known[like])
        for field, value in vars(known[like].routing).items():
            found = getattr(nano.routing, field)
            if field == "aux_loss_coeff":
                assert found == pytest.approx(value * scale), name
            else:
                assert field in sizes or found == value, (name, field)
        assert total_params(nano) < 3e6
    assert set(twins) == {preset.system for preset in known.values()}


def test_routing_is_one_the_plugin_accepts() -> None:
    for preset in presets().values():
        for experts in filter(None, preset.model.experts):
            preset.routing.check_experts(experts)


def row(preset: Preset) -> str:
    sizes = f"{short_count(total_params(preset))} | {short_count(active_params(preset))}"
    return f"| `{preset.name}` | {preset.system} | {sizes} | {words(preset)} |"


def words(preset: Preset) -> str:
    """The routing in a few words."""
    routing = preset.routing
    if not any(preset.model.experts):
        return "dense"
    if preset.router == "expert_choice":
        return f"experts choose, {routing.capacity_factor:g} a token"
    text = f"top-{routing.topk}"
    if routing.score_function != "softmax":
        text += f" {routing.score_function}"
    if routing.second_expert != "all":
        text += f", second {routing.second_expert}"
    if routing.num_groups is not None:
        text += f", {routing.group_topk} of {routing.num_groups} groups"
    if routing.capacity_factor is None:
        text += ", dropless"
    else:
        text += f", capacity {routing.capacity_factor:g}, drop {routing.drop_policy}"
    return text


def table() -> str:
    big = [preset for preset in presets().values() if not preset.name.endswith("-nano")]
    nanos = [f"`{name}`" for name in presets() if name.endswith("-nano")]
    head = "| preset | system | total | active | routing |\n|---|---|---|---|---|\n"
    return head + "\n".join(map(row, big)) + "\n\nFor tests: " + ", ".join(nanos) + "."


def test_the_document_has_this_table() -> None:
    found = re.findall(r"<!-- presets -->\n(.*?)\n<!-- /presets -->", TABLES.read_text(), re.DOTALL)
    assert found == [table()], f"the table of docs/presets.md should be:\n{table()}"


def test_arguments_are_flags_with_values_that_megatron_s_and_ours_name() -> None:
    arguments = megatron_arguments(load("ds-350m-prmoe-32-64"))
    pairs = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    assert pairs["--moe-layer-freq"] == "([0]+[1])*12"
    assert pairs["--ep-experts-per-layer"] == "32*10,64*2"
    assert pairs["--num-experts"] == "64"
    assert pairs["--ep-router-bias"] == "off"  # the experts have biases, the router has none
    arguments = megatron_arguments(load("deepseek-v3"))
    pairs = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    assert pairs["--moe-layer-freq"] == "[0]*3+[1]*58"
    assert pairs["--moe-router-load-balancing-type"] == "seq_aux_loss"


def test_the_command_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["name"] for record in records} == set(presets())
    (v3,) = (record for record in records if record["name"] == "deepseek-v3")
    assert v3["total_params"] == 671_026_419_200
    assert {"system", "active_params", "source"} <= set(v3)
    assert main(["presets", "mixtral-8x7b"]) == 0
    text = capsys.readouterr().out
    assert "--num-experts 8 \\\n" in text
    assert shlex.split(text.replace("\\\n", " "), comments=True) == megatron_arguments(
        load("mixtral-8x7b")
    )
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in presets())
    assert main(["presets", "mixtral"]) == 2
    assert "mixtral-nano" in capsys.readouterr().err


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'qwen3-30b'; use qwen3-30b-a3b"):
        load("qwen3-30b")
