"""`ep-plugin generate`: the texts of a model, at every layout and by transformers, are the same."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
import transformers
import warm
from spawn import preload, run_ranks
from torch import Tensor

from ep_plugin.cli import main
from ep_plugin.commands.generate.source import opened, reading
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams.install import install
from ep_plugin.moe.groups import ExpertGroups

pytestmark = pytest.mark.megatron
preload("ep_plugin.megatron.workers.generate_run")

CASES = ("qwen3_moe", "llama-tied", "deepseek_v2", "mixtral")
PROMPTS = [[3, 5, 7, 11, 2, 9], [4], [8, 6, 1]]
NEW = 10
GREEDY = {"greedy": True, "top_p": 1.0, "temperature": 1.0, "seed": 0}
DRAWN = {"greedy": False, "top_p": 0.95, "temperature": 2.0, "seed": 5}
Texts = list[list[int]]


def texts(model: Any, prompts: Sequence[Sequence[int]], sampling: dict[str, Any]) -> Texts:
    """Return what the model makes of each prompt, as the first rank sees it."""
    from ep_plugin.megatron.workers.generate_run import generate
    from ep_plugin.megatron.workers.sampling import Sampling

    made: Texts = [[] for _ in prompts]

    def on_token(row: int, token: int) -> bool:
        made[row].append(token)
        return False

    generate(model, prompts, NEW, Sampling(**sampling), model.vocab_size, on_token)
    return made


def bf16_error(folder: Path, prompt: Tensor, wanted: Tensor) -> float:
    """Return how far the logits behind `prompt` are in bf16 from those `wanted`, of their size."""
    from ep_plugin.megatron.workers.generate_ranks import Layout
    from ep_plugin.megatron.workers.generate_run import Cached, load_model

    model = load_model(folder, Layout(), None, "bf16")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert torch.bfloat16 in dtypes
    with torch.no_grad():
        found = Cached(model, 1, prompt.shape[1]).read(prompt)
    return float((found.float() - wanted).norm() / wanted.norm())


def alone(folders: dict[str, Path]) -> dict[str, Any]:
    """Return what each model makes on one rank, in several ways."""
    from ep_plugin.megatron.workers.generate_ranks import Layout, groups
    from ep_plugin.megatron.workers.generate_run import Cached, load_model

    cpu_mode.enable()
    install()
    found: dict[str, Any] = {}
    with groups(Layout()):
        for name, folder in folders.items():
            model = load_model(folder, Layout(), None)
            prompt = torch.tensor(PROMPTS[:1])
            length = prompt.shape[1]
            masked = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
            with torch.no_grad():
                whole = model(prompt, torch.arange(length)[None], masked)[:, -1]
                cached = Cached(model, 1, length)
                cached.read(prompt[:, :2])
                steps = [cached.read(prompt[:, i : i + 1]) for i in range(2, length)]
            found[name] = {
                "greedy": texts(model, PROMPTS, GREEDY),
                "each": [texts(model, [prompt], GREEDY)[0] for prompt in PROMPTS],
                "drawn": texts(model, PROMPTS, DRAWN),
                "drawn again": texts(model, PROMPTS[::-1], DRAWN)[::-1],
                "bf16": bf16_error(folder, prompt, whole),
                "other seed": texts(model, PROMPTS, DRAWN | {"seed": 6}),
                "cache": float((steps[-1] - whole).abs().max() / whole.abs().max()),
            }
    return found


def spread(folder: Path, layouts: list[dict[str, int]]) -> list[tuple[Texts, list[Any]]]:
    """Return the greedy texts of each layout, and each group of this rank there."""
    from ep_plugin.megatron.workers.generate_ranks import Layout, groups
    from ep_plugin.megatron.workers.generate_run import load_model

    cpu_mode.enable()
    install()
    made = []
    for degrees in layouts:
        layout = Layout(**degrees)
        with groups(layout):
            model = load_model(folder, layout, None)
            found: ExpertGroups = model.decoder.layers[-1].mlp.layer.groups
            named = [found.ep, found.etp]
            lists = [group and dist.get_process_group_ranks(group) for group in named]
            made.append((texts(model, PROMPTS, GREEDY), lists))
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return {case: (Hugging Face folder, Megatron folder)}."""
    root = tmp_path_factory.mktemp("generate")
    found = {}
    for case in CASES:
        hf = hf_models.save(case, root / case)
        (root / f"{case}-scratch").mkdir()
        with reading(opened(hf, None), root / f"{case}-scratch", alone=True) as megatron:
            found[case] = (hf, megatron)
    return found


@pytest.fixture(scope="module")
def one_rank(folders: Any) -> dict[str, Any]:
    (found,) = run_ranks(1, alone, {case: pair[1] for case, pair in folders.items()})
    return dict(found)


@torch.no_grad()
def by_transformers(folder: Path) -> Texts:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        made.append(whole[0, len(prompt) :].tolist())
    return made


@pytest.mark.parametrize("case", CASES)
def test_one_rank_is_what_transformers_makes_with_and_without_cache(
    case: str, folders: Any, one_rank: dict[str, Any]
) -> None:
    made = one_rank[case]
    assert made["greedy"] == by_transformers(folders[case][0])
    assert made["each"] == made["greedy"]
    assert made["cache"] < 1e-5
    assert 1e-5 < made["bf16"] < 0.03
    assert made["drawn"] == made["drawn again"]
    assert made["drawn"] not in (made["other seed"], made["greedy"])


def test_every_layout_makes_the_same(folders: Any, one_rank: dict[str, Any]) -> None:
    layouts = [{"ep": 4}, {"ep": 2, "tp": 2}, {"ep": 2, "etp": 2, "tp": 2}]
    ranks = run_ranks(4, spread, folders["qwen3_moe"][1], layouts)
    for number, degrees in enumerate(layouts):
        assert ranks[0][number][0] == one_rank["qwen3_moe"]["greedy"], degrees


def test_eight_ranks_slice_four_experts_as_deepspeed_does(
    folders: Any, one_rank: dict[str, Any]
) -> None:
    ranks = run_ranks(8, spread, folders["qwen3_moe"][1], [{"ep": 4, "etp": 2}])
    made, _ = ranks[0][0]
    assert made == one_rank["qwen3_moe"]["greedy"]
    for number, (found,) in enumerate(ranks):
        experts = [0, 1, 2, 3] if number < 4 else [4, 5, 6, 7]
        assert found[1] == [experts, [number % 4, number % 4 + 4]]


def each(folders: list[Path], degrees: dict[str, int]) -> list[Texts]:
    """Return the greedy texts of each folder's model in one layout."""
    return [spread(folder, [degrees])[0][0] for folder in folders]


def test_capacity_is_that_of_evaluation(
    folders: Any, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    """One place an expert: in training it changes no text, in evaluation the same at any EP."""
    small = {"ep_capacity_factor": 0.01, "ep_min_capacity": 1}
    cases = [small, small | {"ep_eval_capacity_factor": 0.01}]
    copies = [tmp_path / str(number) for number in range(len(cases))]
    for copy, args in zip(copies, cases, strict=True):
        shutil.copytree(folders["qwen3_moe"][1], copy)
        common = torch.load(copy / "common.pt", weights_only=False)
        vars(common["args"]).update(args)
        torch.save(common, copy / "common.pt")
    (alone,) = run_ranks(1, each, copies, {})
    together = run_ranks(2, each, copies, {"ep": 2})[0]
    assert alone == together
    assert alone[0] == one_rank["qwen3_moe"]["greedy"]
    assert alone[1] != alone[0]


class Broken:
    """A model whose logits are not finite from the second new token on."""

    vocab_size = 8

    def __init__(self, value: float) -> None:
        self.value, self.read = value, 0

    def read_tokens(self, tokens: Tensor) -> Tensor:
        self.read += tokens.shape[1]
        logits = torch.zeros(len(tokens), self.vocab_size)
        logits[-1, 3] = self.value if self.read > 6 else 1.0
        return logits


def ended(values: list[float]) -> list[str]:
    """Return what this rank says of each broken model."""
    run = import_module("ep_plugin.megatron.workers.generate_run")
    said = []
    for value in values:
        model = Broken(value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "Cached", lambda *_, m=model: SimpleNamespace(read=m.read_tokens))
            with pytest.raises(ConfigError) as refused:
                texts(model, PROMPTS[:1], DRAWN)
            said.append(str(refused.value))
    return said


def test_logits_that_are_not_finite_end_all_ranks_alike() -> None:
    one, other = run_ranks(2, ended, [float("nan"), float("inf")])
    assert one == other
    assert [sentence.partition(" have ")[0] for sentence in one] == [
        "the logits behind 7 tokens"
    ] * 2


def differing(jobs: list[dict[str, Any]]) -> str:
    """Return what this rank says of its job; "" where all have one."""
    from ep_plugin.megatron.workers.generate_ranks import _check_alike

    try:
        _check_alike(jobs[dist.get_rank()], torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_different_prompts_are_refused_on_all_alike() -> None:
    job = {"prompts": [[1, 2]], "num_tokens": 3, "store": None, "folder": "a"}
    assert run_ranks(2, differing, [job, job | {"folder": "b"}]) == ["", ""]
    said = run_ranks(2, differing, [job, job | {"prompts": [[1, 3]]}])
    assert said[0] == said[1]
    assert "rank 1 was started with other prompts" in said[0]


class Forked:
    """What `start` makes of subprocess.Popen, forked from a process that has imported Megatron."""

    out = ""

    def __init__(self, command: list[str], stderr: Any, env: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        where = (command[1:], env, self.out, stderr.name)
        self.process = context.Process(target=warm._rank, args=where)
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self) -> None:
        self.process.join()

    def kill(self) -> None:
        self.process.kill()


def test_the_command_starts_ranks_and_shows_lines(
    folders: Any, one_rank: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks; prompts are numbers, since this model was given no tokenizer."""
    hf, _ = folders["qwen3_moe"]
    words = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    module = import_module("ep_plugin.commands.generate.start")
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=Forked))
    monkeypatch.setattr(Forked, "out", str(tmp_path / "out"))
    options = ["--json", "--ep", "2", "--num-tokens", str(NEW), "--tokenizer", "numbers"]
    given = ["generate", str(hf), "--greedy", "--stop", " 0 0 0", *options, "--prompt", *words]
    assert main(given) == 0
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == words
    assert [line["tokens"] for line in lines] == one_rank["qwen3_moe"]["greedy"]
    assert {line["reason"] for line in lines} == {"length"}


@pytest.mark.newest
def test_torchrun_starts_ranks_of_its_own(folders: Any, one_rank: dict[str, Any]) -> None:
    _, megatron = folders["mixtral"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ours = ["-m", "ep_plugin.cli", "generate", str(megatron), "--ep", "2", "--greedy"]
    done = subprocess.run(
        [sys.executable, *torchrun, *ours, "--num-tokens", str(NEW), "--tokenizer", "numbers",
        "--prompt", " ".join(map(str, PROMPTS[0]))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole = [*PROMPTS[0], *one_rank["mixtral"]["greedy"][0]]
    assert done.stdout == " ".join(map(str, whole)) + "\n"
