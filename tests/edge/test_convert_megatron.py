"""Conversion against Megatron itself: a dense checkpoint it saved, models it builds, a loop it
runs."""

import argparse
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flag_values import CASES, PLAIN, given, parser
from loop import SCRIPT
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import moe_module_specs as specs
from megatron.training import arguments as megatron_arguments
from spawn import run_ranks
from torch import Tensor
from warm import run_script

from ep_plugin.checkpoint.adapt.ffn import ExpertMaker, FfnTensor
from ep_plugin.checkpoint.formats.dist_writer import write_checkpoint
from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Region, Source, TensorInfo
from ep_plugin.cli import main
from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.arguments.table import BY_NAME
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams.install import install, uninstall
from ep_plugin.megatron.settings import EdgeSettings, moe_config
from ep_plugin.megatron.workers import model_run, saved_model

pytestmark = pytest.mark.megatron

ROOT = Path(__file__).parents[2]
STOCK = ROOT / "tests" / "helpers" / "stock_run.py"
E = 4
LAYERS = "[0,1,1]"
MODEL = (
    "--transformer-impl local --num-layers 3 --hidden-size 32 --ffn-hidden-size 64 "
    "--num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --no-rope-fusion "
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --use-cpu-initialization"
)
RUN = (
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 1e-2 "
    "--lr-decay-style constant --mock-data --tokenizer-type NullTokenizer --vocab-size 127 "
    "--eval-iters 0 --eval-interval 100 --log-interval 1 "
    "--distributed-backend gloo --ckpt-format torch_dist --seed 11 --clip-grad 0 "
    "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
)


def pretrain(ranks: int, launcher: list[str], *flags: str) -> dict[int, float]:
    """Run Megatron's loop; returns the loss of each iteration."""
    device = {"EP_PLUGIN_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    environment = os.environ | device | {"MODEL_CLASS": "gpt"}  # whose names are held below
    done = run_script(ranks, [*launcher, SCRIPT, *f"{MODEL} {RUN}".split(), *flags], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", done.stdout)
    return {int(iteration): float(loss) for iteration, loss in lines}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """A dense model after two of its three iterations, and the loss of each."""
    folder = tmp_path_factory.mktemp("dense")
    save = ["--save", str(folder), "--save-interval", "2"]
    losses = pretrain(1, ["-m", "ep_plugin.run"], *save)
    assert sorted(losses) == [1, 2, 3]
    assert losses[3] < losses[1]
    return folder / "iter_0000002", losses


@pytest.fixture(scope="module")
def moe(dense: tuple[Path, dict[int, float]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with experts in two of its three layers."""
    target = tmp_path_factory.mktemp("moe") / "converted"
    assert convert(dense[0], target, "--layers", LAYERS) == 0
    return target


def convert(source: Path, target: Path, *flags: str) -> int:
    paths = ["--from", str(source), "--to", str(target)]
    return main(["convert", *paths, "--num-experts", str(E), "--topk", "2", *flags])


def test_parity(moe: Path) -> None:
    """Logits and every layer agree, every expert was asked, and the report is kept."""
    report = json.loads((moe / "parity.json").read_text())
    assert report["passed"]
    assert report["logits_max_abs_diff"] < 1e-5 < report["logits_max_abs"]
    assert [row["moe"] for row in report["layers"]] == [False, True, True]
    assert [row["experts_used"] for row in report["layers"]] == [None, E, E]
    for row in report["layers"]:
        assert row["max_abs_diff"] < 1e-5 < row["max_abs"]
    assert report["layers"][0]["max_abs_diff"] == 0
    assert not torch.distributed.is_initialized()


def test_parity_of_given_prompts(dense: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    ids = tmp_path / "prompts.json"
    ids.write_text("[[1, 2, 3], [4, 5, 6, 7, 8]]")
    assert convert(dense[0], tmp_path / "moe", "--prompts", str(ids)) == 0
    report = json.loads((tmp_path / "moe" / "parity.json").read_text())
    assert (report["prompts"], report["tokens"], report["sequence_length"]) == (2, 8, 5)
    assert report["logits_max_abs_diff"] < 1e-5 < report["logits_max_abs"]


def test_corrupted_expert_fails_parity(
    dense: tuple[Path, dict[int, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One expert of one layer scaled: exit code 1, and no output is left."""
    experts = ExpertMaker.experts

    def corrupted(
        maker: ExpertMaker, values: Tensor, part: FfnTensor, *rest: Any
    ) -> Iterator[tuple[int, Tensor]]:
        for expert, made in experts(maker, values, part, *rest):
            broken = (part.layer, part.fc, expert) == (2, 2, 3)
            yield expert, made * 3 if broken else made

    monkeypatch.setattr(ExpertMaker, "experts", corrupted)
    assert convert(dense[0], tmp_path / "moe") == 1
    captured = capsys.readouterr()
    assert re.search(
        r"comparison failed: logits differ by .*, more than --parity-tolerance 1.0e-04",
        captured.err,
    )
    assert list(tmp_path.iterdir()) == []


def rewrite(dense: Path, target: Path, key_per_expert: bool, **changes: Any) -> Source:
    """Save the dense checkpoint again, unstacked, with other run arguments; returns the old one.

    key_per_expert: as `singleton_local_shards` does, with SwiGLU's halves under their own names.
    """
    source = open_checkpoint(dense)
    vars(source.common["args"]).update(changes)
    source.common["content_metadata"]["singleton_local_shards"] = key_per_expert
    content: list[NewTensor | NewObject] = []
    for name, info in source.tensors.items():
        if name.startswith("optimizer"):
            continue
        values = source.read_tensor(name)
        parts = {name: values}
        if key_per_expert and name.endswith("mlp.linear_fc1.weight"):
            parts = dict(zip((f"{name}_w", f"{name}_v"), values.chunk(2), strict=True))
        for key, part in parts.items():
            region = Region((0,) * part.dim(), part.clone())
            shape = TensorInfo(tuple(part.shape), info.dtype)
            content.append(NewTensor(key, shape, partial(iter, [region])))
    names = [name for name in source.objects if not name.startswith("rng_state")]  # never copied
    content += [NewObject(name, source.read_object(name)) for name in names]
    write_checkpoint(target, source, source.common, content, lambda _: None)
    return source


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        ("--topk 2 --mode drop --drop-ratio 0.5", False),
        ("--topk 2 --mode noise --shared-expert copy", False),
        ("--topk 1 --pre-softmax --router-init zero", True),
        ("--preset v3-nano --num-experts 16 --shared-expert copy", True),
    ],
)
def test_what_moves_is_reported_and_what_does_not_is_checked(
    dense: tuple[Path, dict[int, float]], tmp_path: Path, flags: str, exact: bool
) -> None:
    """By Megatron's own parts: experts that were changed, and gates with another sum than 1."""
    paths = ["--from", str(dense[0]), "--to", str(tmp_path / "moe"), "--drop-optimizer"]
    settings = [*flags.split(), "--layers", LAYERS]
    assert main(["convert", *paths, "--num-experts", str(E), *settings]) == 0
    report = json.loads((tmp_path / "moe" / "parity.json").read_text())
    assert report["passed"]
    assert report["same"] == exact
    assert bool(report["deviations"]) != exact
    assert (report["logits_max_abs_diff"] < 1e-5) == exact


def test_transformer_engine_names(dense: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    """A checkpoint under Transformer Engine's names loads and agrees as well."""
    rewrite(dense[0], tmp_path / "dense", False, transformer_impl="transformer_engine")
    assert convert(tmp_path / "dense", tmp_path / "moe", "--layers", LAYERS) == 0
    names = open_checkpoint(tmp_path / "moe").tensors
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" not in names
    report = json.loads((tmp_path / "moe" / "parity.json").read_text())
    assert report["logits_max_abs_diff"] < 1e-5


def test_a_name_per_expert(dense: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    """A source saved with singleton_local_shards gives such a checkpoint, and Megatron loads it."""
    source = rewrite(dense[0], tmp_path / "dense", True)
    assert convert(tmp_path / "dense", tmp_path / "moe", "--layers", LAYERS) == 0
    new = open_checkpoint(tmp_path / "moe")
    layer = "decoder.layers.2.mlp."
    gate, value = source.read_tensor(f"{layer}linear_fc1.weight").chunk(2)
    for expert in range(E):
        fc1 = f"{layer}experts.experts.{expert}.linear_fc1.weight"
        assert torch.equal(new.read_tensor(f"{fc1}_w"), gate)
        assert torch.equal(new.read_tensor(f"{fc1}_v"), value)
    report = json.loads((tmp_path / "moe" / "parity.json").read_text())
    assert report["logits_max_abs_diff"] < 1e-5


LAYOUTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 4))  # tensor- and expert-parallel size


@pytest.mark.newest
def test_granular_with_a_residual_expert_loads_in_every_layout(
    dense: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    """Halves of the FFN as 8 experts, top-4, beside a shared expert weighed by a learned softmax:
    parity holds, and each rank of each layout gets its part to the bit.
    """
    flags = ["--num-experts", "8", "--topk", "4", "--mode", "granular", "--granularity", "2"]
    flags += ["--shared-expert", "learned", "--layers", LAYERS]
    assert convert(dense[0], tmp_path / "moe", *flags) == 0
    report = json.loads((tmp_path / "moe" / "parity.json").read_text())
    assert report["deviations"] == []
    assert report["logits_max_abs_diff"] < 1e-5 < report["logits_max_abs"]
    assert [row["experts_used"] for row in report["layers"]] == [None, 8, 8]
    compared = run_ranks(8, load_in_layouts, str(tmp_path / "moe"))
    assert compared == [2 * 7 * len(LAYOUTS)] * 8


def load_in_layouts(path: str) -> int:
    """Load the checkpoint in each layout and compare this rank's part; returns how many tensors."""
    source, compared = open_checkpoint(Path(path)), 0
    cpu_mode.enable()
    install()
    specs.MoELayer.settings = EdgeSettings(shared_expert="learned")
    for tp, ep in LAYOUTS:
        parallel_state.initialize_model_parallel(
            tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        common = dist_checkpointing.load_common_state_dict(str(source.folder))
        args = saved_model.plain(common["args"])
        args.tensor_model_parallel_size, args.expert_model_parallel_size = tp, ep
        args.sequence_parallel = tp > 1
        model = saved_model.build(args)
        saved_model.load_weights(
            model, source.folder, common["content_metadata"], fused_norm_kept=True
        )
        for layer in (1, 2):
            mlp = model.decoder.layers[layer].mlp
            for name, part in mlp.named_parameters():
                key = name.replace("experts.linear", "experts.experts.linear")
                if name.startswith("shared_experts"):
                    key = name
                whole = source.read_tensor(f"decoder.layers.{layer}.mlp.{key}")
                assert torch.equal(part, own_part(whole, name)), (tp, ep, name)
                compared += 1
        parallel_state.destroy_model_parallel()
    uninstall()
    cpu_mode.disable()
    return compared


def own_part(whole: Tensor, name: str) -> Tensor:
    """What a rank holds: its experts, and its channels of the shared expert."""
    if name.startswith("experts."):
        ranks, rank = (
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_rank(),
        )
        return whole.chunk(ranks)[rank]
    ranks, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if name == "shared_experts.linear_fc1.weight":
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    if name == "shared_experts.linear_fc2.weight":
        return whole.chunk(ranks, dim=1)[rank]
    return whole


MOE = (
    f"--exit-on-missing-checkpoint --num-experts {E} --moe-router-topk 2 "
    f"--moe-layer-freq {LAYERS} --moe-token-dispatcher-type alltoall"
)


def test_megatron_s_own_moe_resumes(dense: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    """At EP=1, without the plugin, with the optimizer: the loss is the dense run's on the next
    batch, and no name is missing or left over.
    """
    assert (
        convert(dense[0], tmp_path / "moe", "--layers", LAYERS, "--skip-parity", "--ep", "1") == 0
    )
    flags = ["--load", str(tmp_path / "moe"), *MOE.split(), "--dist-ckpt-strictness", "raise_all"]
    losses = pretrain(1, [str(STOCK)], *flags)
    assert list(losses) == [3]
    assert losses[3] == pytest.approx(dense[1][3], rel=1e-5)


def test_resumes_with_the_optimizer(
    dense: tuple[Path, dict[int, float]], moe: Path, tmp_path: Path
) -> None:
    """Without --finetune or --no-load-optim, at EP=2: after the next step moments and weights of
    all that is not an expert are the dense run's, and the experts' moments add up to the dense
    ones'. No name is missing or left over.
    """
    flags = ["--load", str(moe), "--save", str(tmp_path), "--save-interval", "3", *MOE.split()]
    flags += ["--dist-ckpt-strictness", "raise_all", "--expert-model-parallel-size", "2"]
    losses = pretrain(2, ["-m", "ep_plugin.run"], *flags)
    assert list(losses) == [3]
    assert losses[3] == pytest.approx(dense[1][3], rel=1e-5)
    before = open_checkpoint(dense[0])
    after, new = open_checkpoint(dense[0].parent), open_checkpoint(tmp_path)
    states = ("", *(f"optimizer.state.{kind}." for kind in ("exp_avg", "exp_avg_sq", "param")))
    compared = 0
    for name in new.tensors:
        state = next((s for s in reversed(states) if name.startswith(s)), "")
        if ".experts." not in name and ".router." not in name:
            assert_close(new.read_tensor(name), after.read_tensor(name))
            compared += 1
        elif state.endswith("exp_avg.") and ".experts." in name:
            # exp_avg = 0.9 * old + 0.1 * gradient, and the experts' gradients add up to the dense.
            old = before.read_tensor(name.replace("experts.experts.", ""))
            dense_avg = after.read_tensor(name.replace("experts.experts.", ""))
            gradients = (new.read_tensor(name) - 0.9 * old) / 0.1
            assert_close(gradients.sum(dim=0), (dense_avg - 0.9 * old) / 0.1)
            assert float(gradients.abs().amax(dim=(1, 2)).min()) > 0
    assert compared == 4 * (1 + 1 + 3 * 4 + 2)  # embedding, last norm, layers, the dense MLP


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_how_a_run_sent_and_multiplied_is_nothing_to_the_model_in_its_checkpoint() -> None:
    """Whatever a run had of these flags, ours and Megatron's, one plain rank is built the same."""
    groups = ("dispatch", "overlap", "fp8")
    ours = [given(name, value) for name, value in CASES if BY_NAME[name].group in groups]
    theirs = [
        ["--moe-token-dispatcher-type", "flex", "--moe-enable-deepep"],
        ["--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "hybridep"],
    ]
    assert len(ours) > 10
    built = []
    for flags in ([], *ours, *theirs):
        args = parser().parse_args([*PLAIN, *flags])
        plain = argparse.Namespace(**(vars(args) | saved_model._PLAIN))
        config = megatron_arguments.core_transformer_config_from_args(plain)
        built.append(moe_config(config, settings_from_args(plain), 1))
    assert len({*built}) == 1


def test_positions_are_those_that_the_run_had() -> None:
    """A position that training divided by a factor is divided in the model that is built here."""
    words = ["--padded-vocab-size", "128", "--position-embedding-type", "rope", "--no-rope-fusion"]
    angles = []
    for flags in ([], ["--rotary-seq-len-interpolation-factor", "4"]):
        args = saved_model.plain(parser().parse_args([*PLAIN, *words, *flags]))
        with model_run._one_rank(seed=1):
            specs.MoELayer.settings = settings_from_args(args)
            angles.append(saved_model.build(args).rotary_pos_emb(32))
    assert torch.equal(angles[0][:8], angles[1][::4])


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (3, 0), None])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_a_window_is_that_of_the_run_s_own_attention(
    window: tuple[int, int] | None, implementation: str
) -> None:
    """Transformer Engine's -1 has no end; Megatron's own attention sees nothing with it."""
    saved = argparse.Namespace(window_size=window, transformer_impl=implementation)
    without_end = window is not None and window[0] < 0 and implementation != "local"
    assert saved_model.plain(saved).window_size == (None if without_end else window)
