"""`flags.txt`: whole models in flags, read as data. What is planted in it is refused by name."""

import argparse
import ast
import inspect
import os
import random
import re
import string
from pathlib import Path
from typing import Any

import flag_values
import hf_models
import pytest
from documents import megatron_parser

from ep_plugin.checkpoint import family
from ep_plugin.checkpoint.adapt.hugging_face import arguments
from ep_plugin.checkpoint.scopes import SCOPES
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments import flags_file, spell_model
from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.arguments.spell import megatron_arguments
from ep_plugin.megatron.arguments.table import BY_NAME, TABLE
from ep_plugin.megatron.arguments.theirs_table import OUTSIDE
from ep_plugin.presets import load as load_preset
from ep_plugin.registry import available

GOOD = ["schedule=finetune", "--num-layers", "2", "--swiglu", "--moe-layer-freq", "[0,1]"]
SHELL = (
    "a b",
    "'",
    '"',
    "$(touch planted)",
    "`touch planted`",
    "; touch planted",
    "$HOME",
    "a\\nb",
)
PATHS = ("/etc/passwd", "../x", "a/b", "~", "my_package.my_router", "os.system", "a=b", "{0}", "%s")
BYTES = ("a\tb", "a\rb", "\x00", "\x1b[2J", "\u2028", "\u0661", "a\vb", " 1", "1 ", "", "-x", "-")
OPENS = re.compile(r"path|file|dir\b|--load|-save\b|module|config|tokenizer|spec\b|cfg")
CASES = [*SHELL, *PATHS, *BYTES]
LATER = {  # flags of Megatron 0.19, which older runs cannot have set
    *("--yarn-original-max-position-embeddings", "--yarn-beta-fast", "--yarn-beta-slow"),
    "--no-yarn-correction-range-round-to-int",
}


def refusal(path: Path, lines: list[str], kind: str = "model") -> str:
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError) as error:
        flags_file.read(path, kind)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 600
    return text


@pytest.mark.parametrize("word", CASES, ids=ascii)
def test_a_planted_word_is_refused_wherever_it_stands(word: str, tmp_path: Path) -> None:
    """Alone, behind a flag, glued to one, and instead of the first line."""
    path = tmp_path / "flags.txt"
    lines = [*GOOD, "--hidden-size", word]
    assert ascii(word)[:60] in refusal(path, lines)
    refusal(path, [*GOOD, word])
    refusal(path, [*GOOD, "--swiglu" + word])
    refusal(path, [*GOOD, "--hidden-size=" + word])
    refusal(path, [word, *GOOD[1:]])
    refusal(path, ["schedule=" + word, *GOOD[1:]])


def test_random_words_are_read_as_they_are_or_refused(tmp_path: Path) -> None:
    """What passes has no character that a shell, a path or an import would need."""
    rng, path, passed = random.Random(3), tmp_path / "flags.txt", 0
    pool = string.printable + "\x00\x1b\u2028\xe9"
    for _ in range(500):
        word = "".join(rng.choices(pool, k=rng.randint(1, 6)))
        path.write_text("\n".join([*GOOD, "--hidden-size", word]) + "\n")
        try:
            words = flags_file.read(path, "model")
        except ConfigError:
            continue
        passed += 1
        assert words == [*GOOD, "--hidden-size", *word.split("\n")]
        assert re.fullmatch(r"[A-Za-z0-9_.,*+\[\]-]+", words[-1])
    assert passed > 5


@pytest.mark.megatron
def test_every_other_flag_of_megatron_s_is_refused_by_name(tmp_path: Path) -> None:
    """All flags of its parser, those that open files or load code among them."""
    legal = flags_file.FLAGS["model"]
    actions = {flag: a for a in megatron_parser()._actions for flag in a.option_strings}
    older = not LATER & actions.keys()
    assert legal.keys() - actions.keys() == (LATER if older else set())
    dangerous = {"--load", "--save", "--data-path", "--spec", "--tokenizer-model", "--yaml-cfg"}
    dangerous |= {"--ep-parity-dump", "--heterogeneous-layers-config-path", "--tensorboard-dir"}
    others = actions.keys() - legal.keys()
    assert dangerous <= others
    for flag in others:
        with pytest.raises(ConfigError, match=f"got '{flag[:60]}"):
            flags_file.check([*GOOD, flag, "1"], "model", tmp_path)
    for flag, takes_value in legal.items():
        if flag not in actions:
            continue
        assert takes_value is (actions[flag].nargs != 0), flag
        assert flag in ("--ep-audit-save", "--ep-check-save", "--ep-save") or not OPENS.search(flag)


def test_own_code_cannot_be_named(tmp_path: Path) -> None:
    """Options of one's own are imported by their name; a file may only name ours."""
    for row in TABLE:
        if row.kind is not None:
            for name in ("my_package", "os", "my_package.my_option"):
                assert row.flag in refusal(tmp_path / "flags.txt", [*GOOD, row.flag, name]) or (
                    "." in name
                )
            ours = [*GOOD, row.flag, available(row.kind)[0]]
            (tmp_path / "flags.txt").write_text("\n".join(ours))
            assert flags_file.read(tmp_path / "flags.txt", "model") == ours


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "flags.txt"
    assert "needs its value" in refusal(path, [*GOOD, "--hidden-size"])
    assert "needs its value" in refusal(path, [*GOOD, "--hidden-size", "--qk-layernorm"])
    assert "a second time" in refusal(path, [*GOOD, "--swiglu"])
    assert "takes one stands before it" in refusal(path, [*GOOD, "--qk-layernorm", "1"])
    assert "takes one stands before it" in refusal(path, [GOOD[0], "1"])
    assert "at most" in refusal(path, [*GOOD, "--hidden-size", "1" * 70000])
    assert "schedule=published" in refusal(path, GOOD, "schedule").partition("; got")[0] + refusal(
        path, ["schedule=x"], "schedule"
    )
    refusal(path, ["schedule=published", *GOOD[1:]])
    refusal(path, ["schedule=own", "--num-layers", "2"], "schedule")
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(tmp_path / "secret")):
        path.rmdir() if path.is_dir() else path.unlink()
        assert not path.exists()
        (tmp_path / "secret").write_text("\n".join(GOOD))
        make()
        with pytest.raises(ConfigError, match="must be a plain file"):
            flags_file.read(path, "model")


def settings_of(case: str) -> argparse.Namespace:
    config = {**hf_models.settings(case).to_dict(), "dtype": "bfloat16"}
    return arguments(config, family.load(hf_models.model_type(case)))


MEANT_OTHERWISE = {
    "moe_grouped_gemm",  # how products are computed
    "use_rotary_position_embeddings",  # an old spelling of position_embedding_type
    "mup_base_hidden_size",  # Megatron takes the hidden size, which it is
    "num_query_groups",  # where there are groups; compared below
}


def plain(value: Any) -> Any:
    """Return a value out of lists of one, and what is off as None."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value or None


@pytest.mark.megatron
@pytest.mark.parametrize("case", hf_models.CASES)
def test_megatron_reads_the_model_that_was_meant(case: str, tmp_path: Path) -> None:
    """Every family: each setting that a flag of Megatron's has comes out of its parser again."""
    args = settings_of(case)
    words = spell_model.model_flags(args)
    flags_file.write_flags(tmp_path, args, from_hf=False)
    assert flags_file.read(tmp_path / "flags.txt", "model") == ["schedule=finetune", *words]
    parser = megatron_parser()
    parsed, rest = parser.parse_known_args(words)
    assert rest == []
    known = {action.dest for action in parser._actions} - MEANT_OTHERWISE
    for name in known & vars(args).keys():
        value = getattr(args, name)
        assert plain(getattr(parsed, name)) == plain(value), name
    assert not parsed.group_query_attention or parsed.num_query_groups == args.num_query_groups
    assert parsed.attention_dropout == parsed.hidden_dropout == 0.0


RESTORED_BESIDE = {  # what Megatron takes from a checkpoint, and is no setting of the model here
    *("moe_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias"),
    *("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"),
    *("tokenizer_model", "tokenizer_type", "tiktoken_pattern", "ckpt_format"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"),
    *("expert_model_parallel_size", "mtp_use_repeated_layer"),
    # old spellings of --position-embedding-type, whose value they have become when a run saves
    *("add_position_embedding", "use_rotary_position_embeddings"),
    "apply_layernorm_1p",  # saved as layernorm_zero_centered_gamma
}


@pytest.mark.megatron
def test_what_megatron_itself_takes_from_a_checkpoint_is_said_or_refused() -> None:
    from megatron.training import checkpointing

    tree = ast.parse(inspect.getsource(checkpointing.load_args_from_checkpoint))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    restored = {
        node.args[0].value
        for node in calls
        if isinstance(node.func, ast.Name)
        and node.func.id == "_set_arg"
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(restored) > 40
    parser = megatron_parser()
    said = {a.dest for a in parser._actions if {*a.option_strings} & {*spell_model.LEGAL}}
    assert restored <= said | {*spell_model.UNSAID} | RESTORED_BESIDE


YARN = {"position_embedding_type": "yarn"}
FURTHER = (("sequence", 0.25), ("global", 1e-5))


def own_model(**changes: Any) -> argparse.Namespace:
    """Return the arguments that a run of Megatron's would save, with some changed."""
    words = megatron_arguments(load_preset("qwen3-nano"))
    args = megatron_parser().parse_args([*words, "--padded-vocab-size", "256"])
    return argparse.Namespace(**{**vars(args), **changes})


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--rotary-percent", "0.5"], {"rotary_percent": 0.5}),
        (["--squared-relu"], {"squared_relu": True}),
        (["--quick-geglu"], {"quick_geglu": True}),
        (["--glu-linear-offset", "1.0"], {"glu_linear_offset": 1.0}),
        (["--activation-func-clamp-value", "0.01"], {"activation_func_clamp_value": 0.01}),
        (["--attention-dropout", "0.25"], {"attention_dropout": 0.25}),
        (["--moe-router-dtype", "fp64"], {"moe_router_dtype": "fp64"}),
        (["--moe-expert-capacity-factor", "1.5"], {"moe_expert_capacity_factor": 1.5}),
        (["--ep-normalize", "none"], {"ep_normalize": "none"}),
        (["--ep-experts-per-layer", "4,8,8,8"], {"ep_experts_per_layer": (4, 8, 8, 8)}),
        (["--moe-z-loss-coeff", "0.001"], {"moe_z_loss_coeff": 0.001}),
        (["--ep-router", "expert_choice"], {"ep_router": "expert_choice"}),
        (["--no-rope-freq", "[0,1,0,1]"], {"no_rope_freq": [0, 1, 0, 1]}),
        *(
            ([f"--{name.replace('_', '-')}", str(value)], {**YARN, name: value})
            for name, value in (
                *(("rotary_scaling_factor", 32.0), ("mscale", 0.7), ("mscale_all_dim", 0.3)),
                *(("yarn_beta_fast", 3.0), ("yarn_beta_slow", 0.5)),
                ("yarn_original_max_position_embeddings", 1024),
            )
        ),
        (
            ["--no-yarn-correction-range-round-to-int"],
            {**YARN, "yarn_correction_range_round_to_int": False},
        ),
        (["--ep-further-losses", "sequence:0.25,global:1e-05"], {"ep_further_losses": FURTHER}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_of_one_s_own_run_go_along(
    flags: list[str], changes: dict[str, Any], tmp_path: Path
) -> None:
    if flags[0] in LATER and flags[0] not in {
        flag for action in megatron_parser()._actions for flag in action.option_strings
    }:
        pytest.skip(f"this Megatron has no {flags[0]}")
    plain, words = (spell_model.model_flags(own_model(**c)) for c in ({}, changes))
    found = " ".join(words)
    assert " ".join(flags) in found
    assert " ".join(flags) not in " ".join(plain)
    flags_file.write_flags(tmp_path, own_model(**changes), from_hf=False)
    assert flags_file.read(tmp_path / "flags.txt", "model") == ["schedule=finetune", *words]
    parsed = megatron_parser().parse_args(words)
    for name, value in changes.items():
        assert getattr(parsed, name) == value


@pytest.mark.megatron
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global"])
def test_several_balancing_losses_are_the_same_run_again(scope: str) -> None:
    """A run writes them into arguments of Megatron's, which are saved, and takes them back."""
    further = ",".join(f"{name}:0.25" for name in SCOPES if name not in (scope, "group"))
    typed = ["--ep-aux-loss-scope", scope, "--ep-further-losses", further]
    typed += ["--moe-router-load-balancing-type", "aux_loss"]  # not the preset's
    words = [*megatron_arguments(load_preset("qwen3-nano")), *typed]
    runs = []
    for _ in range(2):
        args = megatron_parser().parse_args(words)
        routing = {"aux_loss_scope": "micro_batch", **settings_from_args(args).routing}
        runs.append((routing, args.moe_router_load_balancing_type, args.moe_aux_loss_coeff))
        args.padded_vocab_size = 256
        words = spell_model.model_flags(args)
    assert runs[0] == runs[1]
    assert len(runs[0][1]) == len(runs[0][2]) == 3


@pytest.mark.megatron
def test_what_no_flag_says_is_named() -> None:
    assert flags_file.unsaid(own_model()) == []
    assert flags_file.unsaid(own_model(mtp_num_layers=1)) == ["mtp_num_layers"]
    assert flags_file.unsaid(own_model(ep_router="my.router")) == ["--ep-router my.router"]


# Beside attention and dense blocks, and read at a run's start, in its training, or by kernels.
NOT_OF_THE_FUNCTION = """
    apply_rope_fusion attention_backend attention_softmax_in_fp32 bias_dropout_fusion
    cache_mla_latents clone_scatter_output_in_embedding cross_entropy_fusion_impl
    cross_entropy_loss_fusion embedding_init_method_std flash_attention_version
    fp32_residual_connection fp8_output_proj fused_residual_rmsnorm is_hybrid_model
    kitchen_attention_backend log_max_attention_logit masked_softmax_fusion mla_down_proj_fusion
    mup_width_mult qk_clip qk_clip_alpha qk_clip_threshold use_grouped_gemm_for_dense_mlp
    use_kitchen_attention use_mamba_mem_eff_path
"""
# Read where an argument that no file can say is set, or by layers that a GPT does not have.
WITH_ANOTHER = ("dsa_", "linear_", "mamba_", "mtp_")


def other_values() -> dict[str, Any]:
    """Return arguments about attention, norms, dense blocks and widths, each with another value."""
    about = (
        "attention, norms, embedding, output and dense blocks",
        "Mamba, multi-token prediction",
    )
    names = " ".join(text for key, text in OUTSIDE.items() if key.startswith(about)).split()
    beside = NOT_OF_THE_FUNCTION.split()
    default = vars(own_model())
    found: dict[str, Any] = {"quick_geglu": True, "squared_relu": True, "glu_linear_offset": 1.0}
    found |= {"activation_func_clamp_value": 0.01, "softmax_scale": 0.1}
    for name in names:
        if name in default and name not in beside and not name.startswith(WITH_ANOTHER):
            value = default[name]
            if isinstance(value, bool):
                found[name] = not value
            elif isinstance(value, int | float):
                found[name] = value + 1
            else:
                found[name] = 3 if value is None else "other"
    return found


@pytest.mark.megatron
def test_what_changes_the_function_is_said_or_named() -> None:
    """Each setting of Megatron's that a model can have, with another value than the usual."""
    beside: dict[str, Any] = {"use_mup": True, "multi_latent_attention": True}
    plain = spell_model.model_flags(own_model(**beside))
    values = other_values() | dict.fromkeys(beside, False)
    assert len(values) > 30
    lost = [
        name
        for name, value in values.items()
        if spell_model.model_flags(own_model(**{**beside, name: value})) == plain
        and name not in flags_file.unsaid(own_model(**{**beside, name: value}))
    ]
    assert lost == []


OF_THE_MODEL = [case for case in flag_values.CASES if BY_NAME[case[0]].flag in spell_model._OURS]


@pytest.mark.megatron
@pytest.mark.parametrize(("name", "value"), OF_THE_MODEL)
def test_what_is_written_can_be_read(name: str, value: Any, tmp_path: Path) -> None:
    """Every flag of ours that is about the model, with every kind of value."""
    typed = flag_values.given(name, value)
    parsed = megatron_parser().parse_args(typed)
    args = own_model(**{BY_NAME[name].dest: getattr(parsed, BY_NAME[name].dest)})
    assert flags_file.unsaid(args) == []
    flags_file.write_flags(tmp_path, args, from_hf=False)
    lines = flags_file.read(tmp_path / "flags.txt", "model")
    assert lines[lines.index(typed[0]) :][: len(typed)] == typed


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"rope_type": "../rope"}, "--rope-type ../rope"),
        ({"ep_expert_activation": "my.code"}, "--ep-expert-activation my.code"),
        ({"ep_further_losses": (("a", "b"),)}, "--ep-further-losses a:b"),
    ],
)
def test_a_value_that_would_not_be_read_is_named_and_nothing_is_written(
    changes: dict[str, Any], missing: str, tmp_path: Path
) -> None:
    args = own_model(multi_latent_attention=True, **changes)
    assert missing in flags_file.unsaid(args)
    flags_file.write_flags(tmp_path, args, from_hf=False)
    assert list(tmp_path.iterdir()) == []


def test_as_a_program_it_prints_the_words_or_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flags.txt").write_text("\n".join(GOOD))
    assert flags_file.main(["model", str(tmp_path / "flags.txt")]) == 0
    assert capsys.readouterr().out.splitlines() == GOOD
    assert flags_file.main(["model", str(tmp_path / "none")]) == 2
    assert "/none must be a plain file (No such" in capsys.readouterr().err
