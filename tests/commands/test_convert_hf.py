"""Hugging Face models to Megatron and back, with and without experts, against transformers."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ep_plugin.checkpoint import family
from ep_plugin.checkpoint.adapt.hugging_face import arguments, left_out, to_megatron
from ep_plugin.checkpoint.formats import hf_safetensors, megatron_dist
from ep_plugin.checkpoint.open import open_source
from ep_plugin.checkpoint.target import aim, fit_family
from ep_plugin.checkpoint.tensors import NewTensor, Region, TensorInfo
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError

transformers.utils.logging.disable_progress_bar()
megatron = pytest.mark.megatron
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs megatron-core"
)
TOLERANCE = 1e-5  # of a logit in float32
DENSE = ("gemma", "llama", "mistral", "qwen2", "qwen3")
EXPERTS = ["--num-experts", "4", "--topk", "2"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives the folder of a case's model, saved once."""
    root = tmp_path_factory.mktemp("models")

    def folder(case: str) -> Path:
        return root / case if (root / case).exists() else hf_models.save(case, root / case)

    return folder


def convert(source: Path, target: Path, *flags: str) -> int:
    """Convert; the models are run only with --verify."""
    skip = [] if "--verify" in flags else ["--skip-parity"]
    return main(["convert", "--from", str(source), "--to", str(target), *skip, *flags])


def parity(target: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((target / "parity.json").read_text())
    return report


def assert_equal(one: Path, other: Path) -> None:
    """Every tensor of two Hugging Face folders is the other's to the bit, and none is missing."""
    left, right = hf_models.tensors(one), hf_models.tensors(other)
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert values.dtype == right[name].dtype, name
        assert torch.equal(values, right[name]), name


@megatron
@needs_megatron
@pytest.mark.parametrize("case", hf_models.CASES)
def test_there_and_back(case: str, models: Any, tmp_path: Path) -> None:
    """Megatron computes transformers' logits, and the way back gives the same bits and settings."""
    verify = ["--verify", "--parity-tolerance", str(TOLERANCE)]
    assert convert(models(case), tmp_path / "megatron", *verify) == 0
    report = parity(tmp_path / "megatron")
    assert report["logits_max_abs_diff"] < TOLERANCE < report["logits_max_abs"]
    for row in report["layers"]:
        assert row["max_abs_diff"] < TOLERANCE < row["max_abs"]
    assert convert(tmp_path / "megatron", tmp_path / "back", "--format", "hf") == 0
    assert_equal(models(case), tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == ("llama" if case == "llama-tied" else hf_models.model_type(case))
    assert torch.equal(hf_models.logits(models(case)), hf_models.logits(tmp_path / "back"))


@megatron
@needs_megatron
@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v3"])
def test_names_of_the_local_implementation(case: str, models: Any, tmp_path: Path) -> None:
    """They differ from Transformer Engine's in norms; Megatron loads them, and they lead back."""
    flags = ["--transformer-impl", "local", "--verify", "--parity-tolerance", str(TOLERANCE)]
    assert convert(models(case), tmp_path / "local", *flags) == 0
    assert convert(models(case), tmp_path / "te") == 0
    names = [set(megatron_dist.open_checkpoint(tmp_path / d).tensors) for d in ("local", "te")]
    assert names[0] != names[1]
    assert convert(tmp_path / "local", tmp_path / "back", "--format", "hf") == 0
    assert_equal(models(case), tmp_path / "back")


@pytest.mark.parametrize("case", DENSE)
def test_dense_to_experts_of_the_same_house(case: str, models: Any, tmp_path: Path) -> None:
    """Copies of the dense FFN, weights that sum to 1: transformers computes the same for both."""
    target = tmp_path / "moe"
    assert convert(models(case), target, "--format", "hf", *EXPERTS) == 0
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}.get(case, "mixtral")
    difference = hf_models.logits(models(case)) - hf_models.logits(target)
    assert 0 <= difference.abs().max() < TOLERANCE
    copied = [n for n in hf_models.tensors(target) if "experts.3." in n and "shared" not in n]
    assert len(copied) == 3 * 2  # three matrices in each of two layers


@megatron
@needs_megatron
@pytest.mark.parametrize("case", DENSE)
def test_dense_to_experts_in_megatron(case: str, models: Any, tmp_path: Path) -> None:
    """The same in one step to Megatron, which computes transformers' logits of the dense model."""
    flags = ["--verify", "--parity-tolerance", str(TOLERANCE)]
    assert convert(models(case), tmp_path / "moe", *EXPERTS, *flags) == 0
    assert parity(tmp_path / "moe")["logits_max_abs_diff"] < TOLERANCE


@megatron
@needs_megatron
@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("granular", ["--num-experts", "8", "--topk", "4", "--granularity", "2"]),
        ("copy", [*EXPERTS, "--shared-expert", "copy", "--processes", "2"]),
    ],
)
def test_modes_that_keep_the_output(
    mode: str, flags: list[str], models: Any, tmp_path: Path
) -> None:
    """Finer experts, and a shared one: Megatron computes what transformers does of the dense."""
    verify = ["--verify", "--parity-tolerance", str(TOLERANCE)]
    assert convert(models("llama"), tmp_path / "moe", "--mode", mode, *flags, *verify) == 0
    assert parity(tmp_path / "moe")["logits_max_abs_diff"] < TOLERANCE


@megatron
@needs_megatron
def test_a_mode_that_does_not_says_so(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--mode", "drop", "--format", "hf", *EXPERTS, "--verify"]
    assert convert(models("llama"), tmp_path / "moe", *flags) == 0
    assert "the model's output changes: --mode drop draws 50%" in capsys.readouterr().out
    report = parity(tmp_path / "moe")
    assert report["passed"]  # it was not to be kept
    assert not report["same"]
    assert report["deviations"] == ["--mode drop draws 50% of each expert's channels anew"]


def test_some_layers_stay_dense(models: Any, tmp_path: Path) -> None:
    """Hugging Face, Megatron, Hugging Face: the pattern of layers is that of config.json."""
    assert convert(models("qwen3"), tmp_path / "moe", *EXPERTS, "--layers", "[0,1]") == 0
    assert convert(tmp_path / "moe", tmp_path / "hf", "--format", "hf") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["mlp_only_layers"]) == ("qwen3_moe", [0])
    difference = hf_models.logits(models("qwen3")) - hf_models.logits(tmp_path / "hf")
    assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("case", DENSE)
def test_every_way_to_experts_ends_in_the_same_bits(case: str, models: Any, tmp_path: Path) -> None:
    """To experts straight away, or to Megatron first and from there to Hugging Face."""
    assert convert(models(case), tmp_path / "direct", "--format", "hf", *EXPERTS) == 0
    assert convert(models(case), tmp_path / "megatron") == 0
    assert convert(tmp_path / "megatron", tmp_path / "over", "--format", "hf", *EXPERTS) == 0
    assert_equal(tmp_path / "direct", tmp_path / "over")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("direct", "over")]
    source = json.loads((models(case) / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # which Megatron does not keep
        assert configs[0].pop(name, None) == source[name]
    assert configs[0] == configs[1]
    generation = [
        json.loads((f / "generation_config.json").read_text())
        for f in (models(case), tmp_path / "direct")
    ]
    assert generation[0] == generation[1]


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    source = hf_models.save("qwen3_moe", tmp_path / "hf", torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]  # then it is that of the weights
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "megatron") == 0
    args = megatron_dist.open_checkpoint(tmp_path / "megatron").common["args"]
    assert (args.params_dtype, args.bf16) == (torch.bfloat16, True)
    assert convert(tmp_path / "megatron", tmp_path / "back", "--format", "hf") == 0
    assert_equal(source, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_query_groups_are_rows_of_one_matrix(models: Any) -> None:
    """The order of rows that the drawing in hugging_face.py shows, counted by hand."""
    source = hf_safetensors.open_folder(models("qwen3"))
    args = arguments(source.common["config"], family.load("qwen3"))
    merged = to_megatron(source, family.load("qwen3"), args).read_tensor(
        "decoder.layers.1.self_attention.linear_qkv.weight"
    )
    q, k, v = (source.read_tensor(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qkv")
    heads = [q[:16], q[16:32], k[:16], v[:16], q[32:48], q[48:], k[16:], v[16:]]
    assert torch.equal(merged, torch.cat(heads))


def test_a_layer_behind_the_last_is_left_out(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Multi-token prediction, which transformers does not read, is named and not carried over."""
    source = shutil.copytree(models("deepseek_v3"), tmp_path / "hf")
    extra = "model.layers.2.eh_proj.weight"
    edit_shard(source, lambda tensors: tensors | {extra: torch.ones(3)})
    opened = hf_safetensors.open_folder(source)
    assert left_out(opened, family.load("deepseek_v3")) == {extra}
    assert convert(source, tmp_path / "megatron") == 0
    assert f"left out: {extra}" in capsys.readouterr().out


def test_dry_run_names_every_tensor(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dry-run", "--json", *EXPERTS]
    assert convert(models("qwen3"), tmp_path / "moe", *flags) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "moe").exists()
    assert convert(models("qwen3"), tmp_path / "moe", *EXPERTS) == 0
    written = megatron_dist.open_checkpoint(tmp_path / "moe").tensors
    assert {n: tuple(t["shape"]) for n, t in plan["tensors"].items()} == {
        name: info.shape for name, info in written.items()
    }
    assert plan["num_bytes"] == sum(info.num_bytes for info in written.values())
    assert plan["seconds"] == pytest.approx(plan["num_bytes"] / 200e6)
    sources = {name for old, _ in plan["names"] for name in old.split(", ")}
    assert sources == {"(new)", *hf_models.tensors(models("qwen3"))}


def test_nothing_is_read_before_it_is_written(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read one after the other, between the writes of the one before and its own."""
    events: list[str] = []
    source = hf_safetensors.open_folder(models("mixtral"))
    real = source.read_tensor
    object.__setattr__(source, "read_tensor", lambda name: events.append(name) or real(name))
    made = to_megatron(
        source, family.load("mixtral"), arguments(source.common["config"], family.load("mixtral"))
    )
    assert events == []
    for name in made.tensors:
        made.read_tensor(name)
        assert 1 <= len(events) <= 3, name  # q, k and v at most
        events.clear()


def test_writes_what_safetensors_reads(tmp_path: Path) -> None:
    """Shards, regions and odd sizes, read back by the package; no shard is above its limit."""
    generator = torch.Generator().manual_seed(1)
    values = {
        "a": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "b": torch.randn(7, generator=generator),
        "empty": torch.empty(0, 4),
        "c": torch.arange(6).view(2, 3),
    }

    def regions(tensor: torch.Tensor) -> Any:
        if tensor.shape[0] < 2:
            return iter([Region((0,) * tensor.dim(), tensor)])
        zeros = (0,) * (tensor.dim() - 1)
        return iter([Region((1, *zeros), tensor[1:]), Region((0, *zeros), tensor[:1])])

    content = [
        NewTensor(name, TensorInfo(tuple(t.shape), t.dtype), lambda t=t: regions(t))
        for name, t in values.items()
    ]
    counted: list[int] = []
    hf_safetensors.write_folder(tmp_path, {"model_type": "x"}, content, counted.append, 60)
    assert sum(counted) == sum(t.nbytes for t in values.values())
    found = hf_models.tensors(tmp_path)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)
    index = json.loads((tmp_path / hf_safetensors.INDEX).read_text())
    assert index["weight_map"].keys() == values.keys()
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert sum(shard.get_tensor(name).nbytes for name in shard.keys()) <= 60  # noqa: SIM118


def edit_shard(folder: Path, change: Any, name: str | None = None) -> None:
    """Rewrite one shard, the one of tensor `name` or any, and put what is new into the index."""
    index = json.loads((folder / hf_safetensors.INDEX).read_text())
    file = index["weight_map"][name] if name else sorted(index["weight_map"].values())[-1]
    tensors = change(load_file(folder / file))
    save_file(tensors, folder / file)
    kept = {n: f for n, f in index["weight_map"].items() if f != file}
    index["weight_map"] = kept | dict.fromkeys(tensors, file)
    (folder / hf_safetensors.INDEX).write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def forget(folder: Path) -> None:
    path = folder / hf_safetensors.INDEX
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    path.write_text(json.dumps(index))


def lose(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def poison(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"

    def change(tensors: Any) -> Any:
        tensors[name][1, 2] = float("nan")
        return tensors

    edit_shard(folder, change, name)


def without(name: str) -> Any:
    def change(folder: Path) -> None:
        edit_shard(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name}, name)

    return change


BROKEN = {
    "truncated": (truncate, r"model-00002-of-\d+.safetensors is truncated or damaged"),
    "index entry": (forget, r"index.json has no entry for model.layers.1.mlp.up_proj.weight"),
    "file": (lose, r"lacks model-00002-of-\d+.safetensors, which model.safetensors.index.json"),
    "nan": (
        poison,
        r"model.layers.0.mlp.down_proj.weight in .* has 1 values that are NaN or infinite",
    ),
    "untied": (without("lm_head.weight"), r"tie_word_embeddings = false, and there is no lm_head"),
    "tied": (
        lambda folder: edit_config(folder, tie_word_embeddings=True),
        r"tie_word_embeddings = true, and lm_head.weight differs from model.embed_tokens.weight",
    ),
    "missing": (
        without("model.layers.1.mlp.up_proj.weight"),
        r"no complete qwen2: 1 names are missing: model.layers.1.mlp.up_proj.weight",
    ),
    "unknown name": (
        lambda folder: edit_shard(folder, lambda tensors: tensors | {"x.y": torch.ones(2)}),
        r"no complete qwen2: 1 names are in no row of its table: x.y",
    ),
    "vocabulary": (
        lambda folder: edit_config(folder, vocab_size=128),
        r"embed_tokens.weight is \[96, 32\], and config.json asks for \[vocab_size = 128, hidden",
    ),
    "heads": (
        lambda folder: edit_config(folder, num_key_value_heads=4),
        r"k_proj.\w+ is .*, and config.json asks for \[num_key_value_heads \* head_dim = 32",
    ),
    "model_type": (
        lambda folder: edit_config(folder, model_type="gpt2"),
        r"model_type 'gpt2' has no table of names; supported are deepseek_v2, .*, qwen3_moe",
    ),
    "activation": (
        lambda folder: edit_config(folder, hidden_act="gelu"),
        r"config.json has hidden_act = 'gelu'",
    ),
    "rope": (
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "dynamic"}),
        r"has rope_parameters.rope_type = 'dynamic', and Megatron's GPT has no counterpart",
    ),
    "dtype": (
        lambda folder: edit_config(folder, dtype="int8"),
        r"config.json has dtype = 'int8', which no run of Megatron's has; give the weights in",
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "fp8"}),
        r"config.json has a quantization_config",
    ),
    "config": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config.json cannot be read",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_is_refused(
    kind: str, models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2, and nothing is left of the output."""
    source = shutil.copytree(models("qwen2"), tmp_path / "hf")
    change, message = BROKEN[kind]
    change(source)
    assert convert(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_gemma_is_what_its_config_says(models: Any, tmp_path: Path) -> None:
    """The first release's word for the activation is known, others are refused; so is another
    factor of the embeddings in Megatron."""
    known = family.load("gemma")
    config = hf_safetensors.open_folder(models("gemma")).common["config"]
    args = arguments(config, known)
    assert args.mup_embedding_mult == 32**0.5
    assert vars(arguments(config | {"hidden_act": "gelu"}, known)) == vars(args)
    for key, value in (("hidden_activation", "relu"), ("hidden_activation", "gelu")):
        with pytest.raises(ConfigError, match=rf"{key} = '{value}'"):
            arguments(config | {key: value}, known)
    for tanh in (None, "gelu_pytorch_tanh"):  # the other key says nothing, or is right
        with pytest.raises(ConfigError, match="hidden_act = 'relu'"):
            arguments(config | {"hidden_act": "relu", "hidden_activation": tanh}, known)
    args.mup_embedding_mult = 1.0
    with pytest.raises(ConfigError, match=r"no gemma: mup_embedding_mult = 1\.0, not 5\.65"):
        known.config(args)


@pytest.mark.parametrize("factor", ["mup_output_mult", "mup_base_hidden_size"])
def test_gemma_with_experts_and_a_factor_of_logits_is_refused(
    factor: str, models: Any, tmp_path: Path
) -> None:
    """Mixtral has none; a Megatron run with muP at another base width has one."""
    assert convert(models("gemma"), tmp_path / "moe", *EXPERTS) == 0
    opened = open_source(tmp_path / "moe", "hf")
    setattr(opened.args, factor, 16)
    with pytest.raises(ConfigError, match=f"no gemma: {factor} = 16, not"):
        aim(fit_family(opened, opened, "hf", None), "hf", None)


def test_gemma_in_bf16_says_what_folding_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = hf_models.save("gemma", tmp_path / "hf", torch.bfloat16)
    assert convert(source, tmp_path / "moe", "--format", "hf", *EXPERTS) == 0
    assert (
        "output changes: 1 + w of the norms is rounded to torch.bfloat16" in capsys.readouterr().out
    )
    difference = hf_models.logits(source) - hf_models.logits(tmp_path / "moe")
    assert TOLERANCE < difference.abs().max() < 0.02 * hf_models.logits(source).abs().max()


def test_refusals_of_the_command(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert convert(models("llama"), tmp_path / "full") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert convert(models("llama"), tmp_path / "out", "--num-experts", "4") == 2
    assert "--topk, or a --preset that has it, must be given" in capsys.readouterr().err
    assert convert(models("llama"), tmp_path / "out", "--topk", "2") == 2
    assert "--topk is about new experts, and there are to be none" in capsys.readouterr().err
    assert convert(models("mixtral"), tmp_path / "out", *EXPERTS) == 2
    assert "is a Mixture-of-Experts already" in capsys.readouterr().err
    assert convert(models("qwen2"), tmp_path / "megatron") == 0
    assert convert(tmp_path / "megatron", tmp_path / "out") == 2
    assert "is a torch_dist checkpoint already" in capsys.readouterr().err
    assert (
        convert(tmp_path / "megatron", tmp_path / "out", "--format", "hf", "--family", "qwen3") == 2
    )
    assert "the checkpoint is no qwen3: add_qkv_bias = True, not False" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "argument", "value"),
    [
        ("qwen2", "normalization", "LayerNorm"),
        ("qwen2", "ep_dense_activation", "geglu"),
        ("qwen2", "softmax_type", "off-by-one"),
        ("llama", "activation_func_clamp_value", 0.01),
        ("llama", "softmax_scale", 0.1),
        ("qwen3_moe", "glu_linear_offset", 1.0),
        ("qwen3_moe", "ep_normalize", "none"),
        ("qwen3_moe", "ep_normalize", "after_drop"),
        ("deepseek_v2", "ep_normalize", "before_drop"),
        ("deepseek_v3", "ep_normalize", "none"),
        ("deepseek_v3", "layernorm_epsilon", 1e-5),
        ("qwen3_moe", "ep_router", "expert_choice"),
        ("qwen3_moe", "moe_expert_capacity_factor", 1.25),
        ("deepseek_v3", "moe_router_group_topk", 2),
    ],
)
def test_what_config_json_cannot_say_is_refused(
    case: str, argument: str, value: Any, models: Any
) -> None:
    """A Megatron model that computes something else is not exported as if it were that family."""
    known = family.load(case)
    args = arguments(hf_safetensors.open_folder(models(case)).common["config"], known)
    assert known.config(args)["model_type"] == family.recognise(args).model_type == case
    setattr(args, argument, value)
    if argument == "moe_router_group_topk":
        args.moe_router_num_groups, args.moe_router_topk = 4, 2
    with pytest.raises(ConfigError, match=re.escape(str(value))):
        known.config(args)
    delattr(args, argument)  # as before there was such an argument
    if argument not in ("normalization", "layernorm_epsilon", "moe_router_group_topk"):
        assert known.config(args)["model_type"] == case


@pytest.mark.parametrize(
    ("case", "value"),
    [("mixtral", "before_drop"), ("deepseek_v2", "none"), ("deepseek_v3", "before_drop")],
)
def test_what_a_family_does_anyway_may_be_said(case: str, value: str, models: Any) -> None:
    known = family.load(case)
    args = arguments(hf_safetensors.open_folder(models(case)).common["config"], known)
    plain = known.config(args)
    args.ep_normalize = value
    assert known.config(args) == plain


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("beta_fast", 8), ("beta_slow", 2.5), ("original_max_position_embeddings", 1024)],
)
def test_what_a_script_set_of_scaled_positions_is_written(
    case: str, name: str, value: float, models: Any
) -> None:
    """Megatron takes them from its arguments, and has no flag for them beside latent attention."""
    known = family.load(case)
    args = arguments(hf_safetensors.open_folder(models(case)).common["config"], known)
    args.rope_type, args.rotary_scaling_factor, args.mscale = "yarn", 4.0, 1.0
    usual = known.config(args)["rope_scaling"]
    setattr(args, name, value)
    assert known.config(args)["rope_scaling"] == usual | {name: value}


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1)])
def test_a_window_without_an_end_is_none(window: tuple[int, int], models: Any) -> None:
    known = family.load("mixtral")
    args = arguments(hf_safetensors.open_folder(models("mixtral")).common["config"], known)
    args.window_size = window
    assert known.config(args)["sliding_window"] is None


@pytest.mark.parametrize("flags", [[], EXPERTS])
def test_a_padding_token_beyond_the_vocabulary_is_refused(
    flags: list[str], models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers builds no table of embeddings for it, and loads one with other special tokens
    anywhere."""
    source = shutil.copytree(models("llama"), tmp_path / "hf")
    edit_config(source, pad_token_id=95, bos_token_id=97, eos_token_id=[96, 98])
    cut = [*flags, "--format", "hf", "--vocab-size", "90"]
    assert convert(source, tmp_path / "cut", *cut) == 2
    assert "pad_token_id = 95, and the vocabulary has 90 rows; use --vocab-size 96, or set" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "cut").exists()
    edit_config(source, pad_token_id=89)
    assert convert(source, tmp_path / "cut", *cut) == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tmp_path / "cut")
    edit_config(source, pad_token_id=96)
    with pytest.raises(AssertionError, match="Padding_idx"):
        load(source)
    assert convert(source, tmp_path / "run", *flags, "--verify", "--dry-run") == 2
    assert "has 96 rows; set pad_token_id in config.json" in capsys.readouterr().err
    assert convert(source, tmp_path / "run", *flags) == 0  # Megatron does not keep it


def test_special_tokens_that_megatron_does_not_keep_are_named(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(models("llama"), tmp_path / "run") == 0
    assert convert(tmp_path / "run", tmp_path / "back", "--format", "hf") == 0
    assert "config.json names no bos_token_id, eos_token_id and pad_token_id" in (
        capsys.readouterr().out
    )
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & config.keys()


def test_every_family_has_a_case_and_a_row_in_the_document() -> None:
    """The table of docs/conversion.md is what these tests run, in each direction."""
    assert {hf_models.model_type(case) for case in hf_models.CASES} == set(family.names())
    document = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
    table = re.search(r"<!-- families -->\n(.*?)<!-- /families -->", document, re.DOTALL)
    assert table is not None
    assert table[1] == family_table()


def family_table() -> str:
    """Return the table: which conversions the tests of this file run, for every family."""
    upcycled = {
        "gemma": "mixtral",
        "llama": "mixtral",
        "mistral": "mixtral",
        "qwen2": "qwen2_moe",
        "qwen3": "qwen3_moe",
    }
    lines = [
        "| `model_type` | to Megatron | from Megatron | with experts, to Megatron "
        "| with experts, to Hugging Face |",
        "|---|---|---|---|---|",
    ]
    for name in family.names():
        moe = f"yes | `{upcycled[name]}`" if name in DENSE else "has them | has them"
        lines.append(f"| `{name}` | yes | yes | {moe} |")
    return "\n".join(lines) + "\n"
