"""The commands, and every file that each of them opens."""

from dataclasses import dataclass

EXPERTS = ("--num-experts", "4", "--topk", "2")
ALONE = ("--skip-parity",)


@dataclass(frozen=True)
class Command:
    """A command line, the folders that it is given, and every file of those that it opens."""

    argv: tuple[str, ...]  # words with {i}, the folder of inputs, and {o}, where it may write
    folders: tuple[str, ...]
    files: dict[str, str]  # pattern below the inputs -> kind of file (plants.MAKERS)
    writes: tuple[str, ...] = ("{o}",)
    weight: int = 1


TORCH_DIST = {
    "{}/latest_checkpointed_iteration.txt": "text",
    "{}/iter_*/metadata.json": "json",
    "{}/iter_*/.metadata": "metadata",
    "{}/iter_*/*.distcp": "chunks",
}
HF = {
    "hf/config.json": "json",
    "hf/model.safetensors.index.json": "json",
    "hf/*.safetensors": "safetensors",
}
TOKENIZER = {"hf/tokenizer*.json": "json"}
PIECES = {
    "pieces/*.json": "json",
    "pieces/tokenizer.model": "sentencepiece",
}
PER_RANK = {
    "ranks/latest_checkpointed_iteration.txt": "text",
    "ranks/iter_*/mp_rank_*/*.pt": "archive",
}
BESIDE = {"hf/generation_config.json": "json"}
RUN = {
    "run/tensorboard/*/events*": "events",
    "run/logs/evaluate-*.log": "text",
    "run/logs/*.usage.json": "json",
    "run/converted/parity.json": "json",
}


def torch_dist(folder: str, common: bool = False) -> dict[str, str]:
    files = {pattern.format(folder): kind for pattern, kind in TORCH_DIST.items()}
    return files | ({f"{folder}/iter_*/common.pt": "archive"} if common else {})


def _convert(source: str, *flags: str) -> tuple[str, ...]:
    return ("convert", "--from", f"{{i}}/{source}", "--to", "{o}/out", *flags)


def _generate(source: str, *words: str) -> tuple[str, ...]:
    return ("generate", f"{{i}}/{source}", "--num-tokens", "2", "--greedy", *words)


COMMANDS: dict[str, Command] = {
    "audit": Command(
        ("audit", "{i}/moe"), ("moe",), torch_dist("moe") | {"moe/manifest.json": "json"}, weight=3
    ),
    "audit --json": Command(("audit", "{i}/old", "--json"), ("old",), torch_dist("old", True)),
    "convert": Command(_convert("dense", *EXPERTS, *ALONE), ("dense",), torch_dist("dense"),
    weight=3),
    "convert, compared": Command(_convert("dense", *EXPERTS), ("dense",), torch_dist("dense"),
    weight=2),
    "convert --keep-layers": Command(
        _convert("moe", "--keep-layers", "1"), ("moe",), torch_dist("moe"), weight=2
    ),
    "convert --keep-layers, older": Command(
        _convert("old", "--keep-layers", "1,0", *ALONE), ("old",), torch_dist("old", True), weight=2
    ),
    "convert, older": Command(_convert("old", *EXPERTS, *ALONE), ("old",), torch_dist("old", True),
    weight=2),
    "convert to Hugging Face": Command(
        _convert("moe", "--format", "hf", "--verify"), ("moe",), torch_dist("moe"), weight=2
    ),
    "convert per-rank files": Command(
        _convert("ranks", *ALONE), ("ranks",), PER_RANK, weight=3,
    ),
    "convert from Hugging Face": Command(_convert("hf"), ("hf",), HF, weight=3),
    "convert, Hugging Face to the same": Command(
        _convert("hf", "--format", "hf", *EXPERTS, "--prompts", "{i}/files/prompts.txt"), ("hf",
        "files"),
        HF | TOKENIZER | BESIDE | {"files/prompts.txt": "text"}, weight=2,
    ),
    "convert --prompts": Command(
        _convert("hf", "--prompts", "{i}/files/prompts.json"), ("hf", "files"),
        HF | {"files/prompts.json": "json"}
    ),
    "convert --dry-run": Command(_convert("hf", "--dry-run", "--json"), ("hf",),
    {k: HF[k] for k in HF}),
    "convert, again": Command(
        ("convert", "--from", "{i}/dense", "--to", "{i}/kept/out", *EXPERTS, *ALONE), ("dense",
        "kept"),
        torch_dist("dense") | {"kept/.out.partial/journal.jsonl": "lines",
        "kept/.out.partial/checkpoint/*.txt": "text",
        "kept/.out.partial/checkpoint/iter_*/.metadata": "metadata",
        "kept/.out.partial/checkpoint/iter_*/metadata.json": "json",
        "kept/.out.partial/checkpoint/iter_*/*.distcp": "chunks"},
        writes=("{i}/kept",), weight=2,
    ),
    "convert --check": Command(
        ("convert", "--check", "--to", "{i}/moe"), ("moe",),
        torch_dist("moe") | {"moe/manifest.json": "json", "moe/flags.txt": "text"}, weight=2,
    ),
    "generate": Command(
        _generate("moe", "--prompt", "1 2 3", "2 1", "--tokenizer", "numbers", "--ep", "1"),
        ("moe",), torch_dist("moe"), weight=2,
    ),
    "generate, its tokenizer": Command(
        _generate("words", "--prompt", "experts are", "--stop", "x"), ("words",),
        torch_dist("words", True) | {"words/tokenizer.model": "sentencepiece"}, weight=3,
    ),
    "generate from Hugging Face": Command(
        _generate("hf", "--prompts", "{i}/files/prompts.txt", "--json"), ("hf", "files"),
        HF | TOKENIZER | {"files/prompts.txt": "text"}, weight=3,
    ),
    "generate --tokenizer": Command(
        _generate("moe", "--prompt", "experts are", "--tokenizer", "{i}/hf"), ("moe", "hf"),
        torch_dist("moe") | TOKENIZER | {"hf/config.json": "json"}, weight=2,
    ),
    "generate --tokenizer, pieces": Command(
        _generate("moe", "--prompt", "experts are", "--tokenizer", "{i}/pieces"),
        ("moe", "pieces"), torch_dist("moe") | PIECES, weight=3,
    ),
    "generate, its tiktoken": Command(
        _generate("ticks", "--prompt", "MOE 8"), ("ticks",),
        torch_dist("ticks", True) | {"ticks/words.json": "json"}, weight=3,
    ),
    "generate, its byte pairs": Command(
        _generate("pairs", "--prompt", "experts are", "--stop", "x"), ("pairs",),
        torch_dist("pairs", True) | {"pairs/vocab.json": "json", "pairs/merges.txt": "text"},
        weight=3,
    ),
    "generate per-rank files": Command(
        _generate("rank", "--prompt", "1 2 3", "--tokenizer", "numbers"), ("rank",),
        {pattern.replace("ranks", "rank"): kind for pattern, kind in PER_RANK.items()},
    ),
    "report": Command(("report", "--run", "{i}/run", "--to", "{o}"), ("run",), RUN, weight=3),
    "report, any run": Command(
        ("report", "--run", "{i}/any", "{i}/moe", "--to", "{o}", "--json"), ("any", "moe"),
        {"any/tensorboard/events*": "events", "any/train.log": "text",
        "moe/flags.txt": "text"} | torch_dist("moe"),
        weight=2,
    ),
    "plan": Command(
        ("plan", "--topk", "4", "--ep", "2", "4", "--measured", "{i}/files/measured.json",
        "--plot", "{o}/plan.png"),
        ("files",), {"files/measured.json": "json"}, weight=2,
    ),
    "plan --ep-teacher": Command(
        ("plan", "--preset", "ds-350m-mos-l21", "--ep", "2", "4", "--ep-teacher", "{i}/large"),
        ("large",),
        {k: v for k, v in torch_dist("large", True).items() if v != "chunks"}, weight=2,
    ),
    "a run's --ep-teacher": Command(
        ("teach", "{i}/moe"), ("moe",), torch_dist("moe"), weight=3,
    ),
    "bench": Command(
        ("bench", "kernels", "--resume", "--output", "{i}/files/bench.json", "--repeats", "1",
        "--warm", "0"),
        ("files",), {"files/bench.json": "json"}, writes=("{i}/files/bench.json",),
    ),
    "apply": Command(("apply", "--diff", "{i}/files/script.py"), ("files",),
    {"files/script.py": "python"}),
    "flags": Command(("flags", "model", "{i}/moe/flags.txt"), ("moe",), {"moe/flags.txt": "text"},
    weight=2),
    "schedule": Command(
        ("flags", "schedule", "{i}/files/schedule.txt"), ("files",), {"files/schedule.txt": "text"}
    ),
}  # fmt: skip
# Commands that are given no file of somebody else's.
OTHERS: dict[str, Command] = {
    "presets": Command(("presets", "mixtral-8x7b", "--json"), (), {}),
    "doctor": Command(("doctor", "--json"), (), {}),
    "recipes": Command(("recipes", "--copy", "{o}/recipes"), (), {}),
}
RUNS_A_SCRIPT = ("parity", "run")  # that is their purpose


def main(argv: list[str]) -> int:
    """Run a command as the shell would.

    `flags` is what recipes/run.sh asks of a flags.txt, `teach` what a run does with --ep-teacher.
    """
    if argv[0] == "flags":
        from ep_plugin.megatron.arguments import flags_file

        return flags_file.main(argv[1:])
    if argv[0] == "teach":
        from tests.hostile import teacher

        return teacher.main(argv[1])
    if argv[0] == "generate":
        from tests.hostile import rank

        rank.here()
    from ep_plugin.cli import main

    return main(argv)
