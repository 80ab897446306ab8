"""MODEL_CLASS, and what a script trains that can build either class.

That a HybridModel computes what the GPT does, at every layout, is in `test_layouts.py`.
"""

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import MOE, NEWEST, OURS, SHAPE, launch_with
from pretrain_older import load_recipe

from ep_plugin.checkpoint.adapt.model_class import SPLITS
from ep_plugin.commands.report.events import read_run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.chosen_class import ONLY_GPT, become_hybrid, choose, translated
from ep_plugin.megatron.arguments.other_class import check_class
from ep_plugin.megatron.arguments.parser import add_ep_arguments
from ep_plugin.megatron.arguments.stages import segments
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.presets import load, presets

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not NEWEST, reason="Megatron's defaults of one release"),
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]


@functools.cache
def parser() -> argparse.ArgumentParser:
    from megatron.training import arguments

    return add_ep_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))


def parsed(*flags: str) -> Any:
    return parser().parse_args(list(flags))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_stages_are_megatron_s(data: st.DataObject) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    pp, virtual = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 3))
    virtual = virtual if pp > 1 else 1
    embedding, loss = data.draw(st.booleans()) and pp > 1, data.draw(st.booleans()) and pp > 1
    layers = data.draw(st.integers(2, 4)) * pp * virtual - embedding - loss
    first = last = None
    if not embedding and not loss and virtual == 1 and pp > 2 and data.draw(st.booleans()):
        first, last = 1, layers - 1 - 2 * (pp - 2)
    flags = ["--num-layers", str(layers), "--pipeline-model-parallel-size", str(pp)]
    flags += ["--num-virtual-stages-per-pipeline-rank", str(virtual)] if virtual > 1 else []
    flags += ["--account-for-embedding-in-pipeline-split"] if embedding else []
    flags += ["--account-for-loss-in-pipeline-split"] if loss else []
    if first is not None:
        flags += ["--decoder-first-pipeline-num-layers", str(first)]
        flags += ["--decoder-last-pipeline-num-layers", str(last)]
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=embedding,
        account_for_loss_in_pipeline_split=loss,
    )
    expected = [
        get_num_layers_to_build(config, vp_stage=stage if virtual > 1 else None, pp_rank=rank)
        for stage in range(virtual)
        for rank in range(pp)
    ]
    args = parsed(*flags)
    assert segments(args) == expected
    if all(expected):
        _, pattern = translated(args)
        assert pattern is not None
        assert [len(part) // 2 for part in pattern.split("|")] == expected
        become_hybrid(args, pattern)
        assert all(getattr(args, name) == off for name, off in SPLITS.items())


def test_a_layout_of_megatron_s_becomes_cuts() -> None:
    flags = ("--num-layers", "7", "--pipeline-model-parallel-size", "2")
    layout = ("--pipeline-model-parallel-layout", "Ett|t*2|t|ttL")
    args = parsed(*flags, *layout, "--num-experts", "4", "--moe-layer-freq", "[0]*3+[1]*4")
    assert translated(args) == (None, "*-*-|*-*E|*E|*E*E")
    assert translated(parsed(*flags[:2], *flags[2:])) == (None, None)  # Megatron says why not
    empty = ("--num-layers", "2", *flags[2:], "--pipeline-model-parallel-layout", "E|ttL")
    assert translated(parsed(*empty)) == ("a pipeline stage of it has no layers", None)


@pytest.mark.parametrize("name", sorted({*ONLY_GPT} - {"no_rope_freq"}))
def test_what_a_gpt_alone_has_keeps_it_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_CLASS", raising=False)
    flag = "--" + name.replace("_", "-")
    args = parsed("--num-layers", "2")
    assert hasattr(args, name)
    assert flag in parser()._option_string_actions
    setattr(args, name, 1)
    said = choose(args)
    assert said == f"a new run, which trains a GPT: {flag} has no counterpart in a HybridModel"
    monkeypatch.setenv("MODEL_CLASS", "hybrid")
    with pytest.raises(ConfigError, match=rf"{flag} has no counterpart .*; use MODEL_CLASS=gpt"):
        choose(args)


def test_the_documents_list_the_presets_that_stay_gpts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hybrid.md").read_text()
    listed = page.split("<!-- gpts -->")[1].split("<!-- /gpts -->")[0]
    stay = {name for name in presets() if translated(parsed("--ep-preset", name))[1] is None}
    assert {word for word in listed.replace(",", " ").split() if "`" in word} == {
        f"`{name}`" for name in stay
    }
    assert "mixtral-8x7b" not in stay
    for name in {*presets()} - stay:
        _, pattern = translated(parsed("--ep-preset", name))
        assert pattern is not None
        experts = [symbol == "E" for symbol in pattern[1::2]]
        assert experts == [count > 0 for count in load(name).model.experts]


def test_variables_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, flags, said in (
        ("GPT", (), "must be gpt or hybrid; got 'GPT'"),
        ("gpt", ("--hybrid-layer-pattern", "*-"), "contradict each other; leave one of them out"),
    ):
        monkeypatch.setenv("MODEL_CLASS", value)
        with pytest.raises(ConfigError, match=said):
            choose(parsed(*flags))


def test_a_hybrid_that_an_older_loop_cannot_train_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, started = load_recipe(), list[str]()
    # As 0.17's, which has no containers of settings.
    monkeypatch.setattr(recipe, "pretrain", lambda *steps, args_defaults: started.append("gpt"))
    monkeypatch.setenv("MODEL_CLASS", "hybrid")
    with pytest.raises(SystemExit, match="MODEL_CLASS=hybrid needs megatron-core"):
        recipe.main()
    assert not started
    monkeypatch.delenv("MODEL_CLASS")
    recipe.main()
    assert started == ["gpt"]


WARNING = "GPTModel IS DEPRECATED"
LAYERS = ("--num-layers", "2", *SHAPE[2:])
EXPERTS = (*LAYERS, *MOE, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


def train(folder: Path, model_class: str, *flags: str) -> tuple[str, dict[str, list[Any]]]:
    """Return what two ranks said, and what they logged."""
    os.environ["MODEL_CLASS"] = model_class
    try:
        more = ("--tensorboard-dir", str(folder), "--expert-model-parallel-size", "2")
        done = launch_with(2, OURS, *flags, *more)
    finally:
        del os.environ["MODEL_CLASS"]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = read_run(folder)
    return done.stdout + done.stderr, {
        tag: run.series(tag) for tag in ("lm loss", "grad-norm", "load_balancing_loss")
    }


def test_a_new_run_is_a_hybrid_with_the_losses_of_the_gpt_and_goes_on(tmp_path: Path) -> None:
    saved = {name: str(tmp_path / "saved" / name) for name in ("hybrid", "gpt")}
    short, long = ("--train-iters", "4", "--save-interval", "2"), ("--ckpt-step", "2")
    found = {}
    for name, asked in (("hybrid", ""), ("gpt", "gpt")):
        log, found[name] = train(tmp_path / name, asked, *EXPERTS, *short, "--save", saved[name])
        assert (WARNING in log) is (name == "gpt")
        assert ("a new run, which trains a HybridModel (*E*E)" in log) is (name == "hybrid")
    for tag, values in found["gpt"].items():
        assert len(values) == 4
        assert dict(found["hybrid"][tag]) == pytest.approx(dict(values), rel=1e-6), tag
    # Of the folders: as they are, and the GPT's as a HybridModel, which Megatron translates.
    for name, asked in (("hybrid", ""), ("gpt", ""), ("gpt", "hybrid")):
        again = tmp_path / f"{name}-again-{asked}"
        log, on = train(again, asked, *EXPERTS, *short, *long, "--load", saved[name])
        stays = (name, asked) == ("gpt", "")
        assert ("holds a GPT, and goes on as one; ep-plugin convert" in log) is stays
        assert (WARNING in log) is stays
        assert ("loading a GPT checkpoint into the hybrid model" in log) is bool(asked)
        for tag in ("lm loss", "grad-norm"):
            expected = [value for step, value in found[name][tag] if step > 2]
            assert [value for _, value in on[tag]] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pattern", ["*E*E", "*E|*E", "M*E*E", "*-*E", None])
def test_a_folder_s_class_is_followed_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str | None
) -> None:
    from megatron.training import checkpointing

    monkeypatch.delenv("MODEL_CLASS", raising=False)
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    torch.save({"args": argparse.Namespace(hybrid_layer_pattern=pattern)}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    checkpointing_file = Path(checkpointing.get_checkpoint_tracker_filename(str(tmp_path)))
    checkpointing_file.write_text("3")
    flags = ("--num-layers", "2", "--num-experts", "4", "--load", str(tmp_path))
    args = parsed(*flags)
    if pattern is None:
        assert f"{tmp_path} holds a GPT, and goes on as one" in str(choose(args))
        assert args.hybrid_layer_pattern is None
    elif pattern.replace("|", "") == "*E*E":
        assert choose(args) is None
        assert (args.hybrid_layer_pattern, args.num_layers) == ("*E*E", None)
        monkeypatch.setenv("MODEL_CLASS", "gpt")
        with pytest.raises(ConfigError, match=rf"--to {tmp_path}-gpt --model-class gpt"):
            choose(parsed(*flags))
    else:
        with pytest.raises(ConfigError) as raised:
            choose(args)
        assert f"the flags describe *E*E; use --hybrid-layer-pattern '{pattern}'" in str(
            raised.value
        )


GPT_SAVED = {"num_layers": 2, "num_experts": 4, "moe_layer_freq": 1}
REFUSED: dict[str, tuple[str | None, dict[str, Any], dict[str, Any], str]] = {
    "a hybrid as a GPT": (
        None,
        {"hybrid_layer_pattern": "*E*E"},
        {},
        "use --hybrid-layer-pattern '*E*E', or ep-plugin convert --from x --to x-gpt --model-class",
    ),
    "two kinds of blocks": ("*-*E", GPT_SAVED, {}, "the pattern has both - and E; use ep-plugin"),
    "latent attention": ("+E+E", GPT_SAVED, {}, "the pattern has +; use ep-plugin convert --from"),
    "prediction": ("*E*E/*-", GPT_SAVED, {}, "the pattern has multi-token prediction, behind its"),
    "other layers": (
        "*E*E*E",
        GPT_SAVED,
        {},
        "the pattern has 3 attention layers and 3 blocks, and the GPT 2 layers; use ep-plugin",
    ),
    "a layer's own names": (
        "*E*E",
        {**GPT_SAVED, "moe_layer_freq": [1, 1]},
        {},
        "trained with --moe-layer-freq [1, 1], so that each layer has its names; use ep-plugin "
        "convert --from x --to x-hybrid --hybrid-layer-pattern '*E*E', then --load x-hybrid",
    ),
    "the optimizer's state by buckets": (
        "*E*E",
        GPT_SAVED,
        {"distrib_optim_sharding_type": "dp_reshardable"},
        "by parameter (fully_reshardable); the folder has it as 'dp_reshardable'; use ep-plugin "
        "convert --from x --to x-hybrid --hybrid-layer-pattern '*E*E', then --load x-hybrid, or "
        "--no-load-optim",
    ),
    "no state of a distributed optimizer": (
        "*E*E",
        GPT_SAVED,
        {},
        "the folder has no such state; use ep-plugin convert --from x --to x-hybrid",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_megatron_does_not_translate_names_the_conversion(case: str) -> None:
    pattern, saved, metadata, said = REFUSED[case]
    args = argparse.Namespace(hybrid_layer_pattern=pattern, use_distributed_optimizer=True)
    with pytest.raises(ConfigError) as raised:
        check_class(args, Path("x"), argparse.Namespace(**saved), metadata, optimizer=True)
    assert said in str(raised.value)


@pytest.mark.parametrize("pattern", ["*E*E", "M*E|M*E", None])
def test_what_megatron_translates_is_let_through(pattern: str | None) -> None:
    saved = argparse.Namespace(**GPT_SAVED)
    for distributed, optimizer, kind in (
        (True, False, {}),
        (False, True, {}),
        (True, True, {"distrib_optim_sharding_type": "fully_reshardable"}),
    ):
        args = argparse.Namespace(
            hybrid_layer_pattern=pattern, use_distributed_optimizer=distributed
        )
        assert check_class(args, Path("x"), saved, kind, optimizer) is bool(pattern)
