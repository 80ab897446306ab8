"""What a refusal says to use is then accepted: over many sizes, in the words that were typed."""

import random
import re
import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from ep_plugin import RoutingConfig
from ep_plugin.cli import build_parser, main
from ep_plugin.commands import bench
from ep_plugin.commands.parity.layouts import parse
from ep_plugin.commands.parity.sizes import check_sizes
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.checks import _check_heads
from ep_plugin.presets import load, presets

SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 64)
Line = dict[str, Any]  # flag -> value


def plan(line: Line, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return the refusal of `ep-plugin plan` with these flags; None where it is taken."""
    switches = ["--disable-bias-linear"] if "--hybrid-layer-pattern" in line else []
    code = main(["plan", *(word for pair in line.items() for word in map(str, pair)), *switches])
    said = capsys.readouterr().err
    assert (code == 2) == bool(said)
    return said or None


def followed(line: Line, said: str) -> Line:
    """Return the line with the flags that a refusal says to use."""
    words = shlex.split(said.rpartition("; use ")[2])
    return line | dict(zip(words[::2], map(int, words[1::2]), strict=True))


def layer(draw: random.Random) -> Line:
    return {"--experts": draw.choice((8, 24, 64, 256)), "--topk": 2, "--ep": draw.choice(SIZES)}


def model(draw: random.Random) -> Line:
    names = ("qwen3-30b-a3b", "ds-350m-prmoe-32-64", "mixtral-8x7b", "deepseek-v3")
    degrees = {f"--{name}": draw.choice(SIZES[:7]) for name in ("tp", "pp", "ep", "etp", "cp")}
    return {"--preset": draw.choice(names), "--gpus": draw.choice(SIZES) * 8, **degrees}


def hybrid(draw: random.Random) -> Line:
    pattern = draw.choice(("*E*E", "M*ME|G*-E/*-", "*E|*E|*E|M-", "+EG-"))
    degrees = {f"--{name}": draw.choice(SIZES[:5]) for name in ("tp", "pp", "ep", "etp", "cp")}
    model = {"--hybrid-layer-pattern": pattern, "--hidden-size": 2048, "--vocab-size": 32000}
    model |= {"--num-attention-heads": 16, "--num-experts": 64, "--position-embedding-type": "none"}
    return model | {"--seq-length": 4096, "--gpus": draw.choice(SIZES) * 8, **degrees}


@pytest.mark.parametrize("kind", [layer, model, hybrid])
def test_plan_takes_what_it_says_to_use(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a line with one mistake at once; of any, after one sentence for each mistake."""
    draw, refused, mended = random.Random(5), 0, 0
    for _ in range(150):
        line = kind(draw)
        for _ in range(len(line) + 1):
            said = plan(line, capsys)
            if said is None:
                break
            refused += 1
            line = followed(line, said)
        assert said is None, said
        layout = ("--tp", "--pp", "--ep", "--etp", "--cp", "--gpus", "--experts", "--topk")
        flag = draw.choice([name for name in line if name in layout])
        wrong = line | {flag: draw.choice((0, 7, *SIZES))}
        said = plan(wrong, capsys)
        if said is not None:
            mended += 1
            assert plan(followed(wrong, said), capsys) is None, (wrong, said)
    assert min(refused, mended) > 20


def test_parity_takes_the_layout_it_says_to_use() -> None:
    draw, refused = random.Random(5), 0
    for _ in range(300):
        names = draw.sample(("tp", "pp", "cp", "ep", "etp", "dp"), draw.randint(1, 4))
        text = ",".join(f"{name}={draw.choice(SIZES[:7])}" for name in names)
        heads, layers, experts = draw.choice((8, 12, 32)), draw.choice((2, 4, 6)), 8
        flags = f"--num-attention-heads {heads} --num-layers {layers} --num-experts {experts}"
        for _ in range(2):  # at most one sentence of each kind: of the ranks, of the model
            try:
                check_sizes(flags.split(), [parse(text)])
            except ConfigError as error:
                refused += 1
                text = str(error).rpartition("use --layouts ")[2]
        check_sizes(flags.split(), [parse(text)])
    assert refused > 50


def test_a_degree_for_the_heads_is_one_that_goes() -> None:
    for heads in (4, 12, 32, 40):
        for tp in range(1, 41):
            for world in (8, 24, 64):
                args = SimpleNamespace(
                    num_attention_heads=heads,
                    tensor_model_parallel_size=tp,
                    context_parallel_size=1,
                    pipeline_model_parallel_size=2,
                    world_size=world,
                )
                try:
                    _check_heads(args)
                    assert heads % tp == 0
                except ConfigError as error:
                    args.tensor_model_parallel_size = found = int(str(error).split()[-1])
                    _check_heads(args)
                    assert world % (found * 2) == 0


def test_groups_of_experts_are_such_as_go() -> None:
    """Every group-limited routing that is refused, with the first way out that is named."""
    refused = 0
    for experts in (8, 12, 64):
        for topk in (1, 2, 3, 4, 6, 8):
            for groups in (1, 2, 3, 4, 8):
                for group_topk in (1, 2, 3, 4, 8):
                    given = {"topk": topk, "num_groups": groups, "group_topk": group_topk}
                    refused += _mended({**given, "normalize": "none"}, experts)
    assert refused > 100


def _mended(given: dict[str, Any], experts: int) -> bool:
    try:
        RoutingConfig(**given).check_experts(experts)
    except ConfigError as error:
        way_out = str(error.args[0]).rpartition("; use ")[2].partition(" or ")[0]
        changed = {
            name: None if value == "None" else int(value)
            for name, value in re.findall(r"<(\w+)=(\w+)>", way_out)
        }
        assert changed
        RoutingConfig(**{**given, **changed}).check_experts(experts)
        return True
    return False


@pytest.mark.parametrize("name", ["qwen3", "Mixtral", "deepseek", "ds-1.3b", "nano"])
def test_a_preset_that_is_named_is_there_and_published_ones_come_first(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(name)
    near = str(error.value).rpartition("; use ")[2].split(", ")
    assert all(other in presets() for other in near)
    assert name == "nano" or not near[0].endswith("-nano")
    with pytest.raises(ConfigError, match="use a name that `ep-plugin presets` lists"):
        load("nothing like it")


WRONG = (
    "bench layers",
    "bench layer --precision fp16",
    "bench layer --routing zip",
    "bench layer --repeats 0",
    "bench layer --warm -1",
    "bench gemm --backends deepgem",
    "bench overlap --recipes row",
    "bench overlap --dispatchers all2all",
)


@pytest.mark.parametrize("line", WRONG)
def test_bench_takes_what_it_says_to_use(line: str) -> None:
    parser = build_parser("bench")
    with pytest.raises(ConfigError) as error:
        bench._check(parser.parse_args(line.split()))
    first, *rest = str(error.value).rpartition("; use ")[2].split()
    words = line.split()
    words = ["bench", *rest, *words[2:]] if first == "bench" else [*words[:2], first, *rest]
    bench._check(parser.parse_args(words))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("parity", "SCRIPT is missing, and stands first; use ep-plugin parity pretrain_gpt.py"),
        ("parity --layouts ep=2", "SCRIPT is missing, and stands first"),
        ("parity none.py", "SCRIPT must be a Python file; got 'none.py', which is not here"),
        ("plan --imbalance 0.5", "1 at least; got 0.5; use --imbalance 1"),
        ("plan --ep 0", "--ep must be positive; got 0; use --ep 1"),
        ("audit nothing", "checkpoint nothing is not a folder; give the folder that --save named"),
    ],
)
def test_what_is_missing_is_named_first(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert sentence in capsys.readouterr().err
