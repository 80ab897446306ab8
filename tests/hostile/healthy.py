"""Small healthy folders of everything that a command opens."""

import base64
import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from ep_plugin.presets import load
from tests.hostile import pickles, trees

ROOT = Path(__file__).parents[2]
ALPHABET = ("\u0120", *map(chr, range(33, 127)))  # as GPT-2 spells bytes, a space first


def make(root: Path) -> None:
    """Write all folders below `root`; in a process of its own, since libraries start threads."""
    _hugging_face(root / "hf")
    with contextlib.redirect_stdout(sys.stderr):
        _run("--from", root / "hf", "--to", root / "old", *trees.ALONE)
        _as_iteration(root / "old", 10)
        _newer(root / "old", root / "dense")
        _run("--from", root / "dense", "--to", root / "moe", *trees.EXPERTS, *trees.ALONE)
    _with_words(root / "old", root / "words")
    _with_pairs(root / "old", root / "pairs")
    _with_ticks(root / "old", root / "ticks")
    _large(root / "old", root / "large")
    _pieces(root / "words" / "tokenizer.model", root / "pieces")
    _saved(root / "saved")
    _per_rank(root / "ranks")
    _one_rank(root / "old", root / "rank")
    _runs(root)
    _files(root / "files")
    _unfinished(root)


def _run(*words: Any) -> None:
    assert trees.main(["convert", *map(str, words)]) == 0


def _hugging_face(folder: Path) -> None:
    import hf_models
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    hf_models.save("qwen3", folder)
    words = {"[UNK]": 0, "experts": 1, "are": 2, "chosen": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    GenerationConfig(do_sample=True, top_k=5).save_pretrained(folder)


def _as_iteration(folder: Path, number: int) -> None:
    """Let converted weights look like what a run saved."""
    (folder / "release").rename(folder / f"iter_{number:07d}")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(number))
    (folder / "manifest.json").unlink()


def _newer(source: Path, target: Path) -> None:
    """The same with its run arguments among the objects, as newer releases keep them."""
    shutil.copytree(source, target)
    folder = next(target.glob("iter_*"))
    common = torch.load(folder / "common.pt", weights_only=False)
    (folder / "common.pt").unlink()
    buffer = io.BytesIO()
    torch.save([common], buffer)
    found = pickle.loads((folder / ".metadata").read_bytes())
    index, like = MetadataIndex("common_state/shard_0_1"), next(iter(found.storage_data.values()))
    file = folder / "__0_0.distcp"
    place = {"offset": file.stat().st_size, "length": len(buffer.getvalue())}
    found.storage_data[index] = replace(like, relative_path=file.name, **place)
    found.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    with file.open("ab") as stream:
        stream.write(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def _with_words(source: Path, target: Path) -> None:
    """The same with a tokenizer of its own, which its run arguments name."""
    import sentencepiece

    shutil.copytree(source, target)
    lines = ("experts are chosen", "are experts", "chosen experts")
    model = target / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_prefix=str(model), vocab_size=40,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    model.with_suffix(".vocab").unlink()
    _say(target, "SentencePieceTokenizer", tokenizer_model=str(model.with_suffix(".model")))


def _say(folder: Path, kind: str | None = None, **args: Any) -> None:
    """Change run arguments."""
    file = next(folder.glob("iter_*")) / "common.pt"
    common = torch.load(file, weights_only=False)
    vars(common["args"]).update(args | ({"tokenizer_type": kind} if kind else {}))
    torch.save(common, file)


def _with_pairs(source: Path, target: Path) -> None:
    """The same with GPT-2's two files."""
    shutil.copytree(source, target)
    tokens = ["<|endoftext|>", "ex", "ar", "are", "en", *ALPHABET]  # the model knows 96
    vocab, merges = target / "vocab.json", target / "merges.txt"
    vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\ne x\na r\nar e\ne n\n")
    _say(target, "GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))


def _with_ticks(source: Path, target: Path) -> None:
    """The same with a vocabulary of tiktoken, whose sizes are run arguments."""
    shutil.copytree(source, target)
    tokens = [*(bytes([byte]) for byte in range(256)), b"ex"]
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
        for rank, token in enumerate(tokens)
    ]
    file = target / "words.json"
    file.write_text(json.dumps(rows))
    sizes = {"vocab_size": 7 + len(tokens), "tiktoken_num_special_tokens": 7}
    _say(target, "TikTokenizer", tokenizer_model=str(file), **sizes)


def _large(source: Path, target: Path) -> None:
    """The same that says it has the vocabulary of a preset; `plan` reads no tensor."""
    shutil.copytree(source, target)
    _say(target, padded_vocab_size=load("ds-350m-mos-l21").model.vocab)


def _pieces(model: Path, folder: Path) -> None:
    """A Hugging Face folder whose tokenizer is a SentencePiece model."""
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **special})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 4}))


def _saved(root: Path) -> None:
    """What a run saved: weights and moments, layers stacked, each layer a part."""
    import stored

    content = stored.healthy()
    for key, shape in content.shapes.items():
        values = torch.stack([region.values.reshape(-1) for region in content.regions[key]])
        content.add(key, values.reshape(shape), 1 if len(shape) > 2 else 0)
    content.common["args"].hidden_size = stored.H
    stored.write(content, root)


def _per_rank(root: Path) -> None:
    from tests.checkpoint import test_convert_legacy

    test_convert_legacy.save(root, "stacked")


def _one_rank(source: Path, target: Path) -> None:
    """The same as the file of the only rank of a run."""
    from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint

    found = open_checkpoint(source)
    state = {name: found.read_tensor(name) for name in found.tensors}
    folder = target / found.folder.name / "mp_rank_00"
    folder.mkdir(parents=True)
    args = found.common["args"]
    for kind in ("tensor", "pipeline", "expert"):
        setattr(args, f"{kind}_model_parallel_size", 1)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 10}
    torch.save({**common, "model": state}, folder / "model_optim_rng.pt")
    shutil.copy(source / "latest_checkpointed_iteration.txt", target)


def _log(path: Path) -> None:
    lines = [
        f" iteration {i:8}/      40 | elapsed time per iteration (ms): 12.5 |"
        f" learning rate: 1.0E-03 | lm loss: {5 - i / 20:.6E} | grad norm: 1.500 |"
        for i in range(10, 41, 10)
    ]  # fmt: skip
    lines.append(
        " validation loss at iteration 40 on validation set | lm loss value: 3.000000E+00 |"
    )
    path.write_text("\n".join(lines) + "\n")


def _runs(root: Path) -> None:
    from tests.hostile.events import record, scalar

    def log(folder: Path) -> None:
        folder.mkdir(parents=True)
        tags = ("lm loss", "lm loss validation", "load_balancing_loss")
        tags += tuple(f"ep/tokens_per_expert/layer_{n}/expert_{e}" for n in (1, 2) for e in (0, 1))
        data = [record(scalar(tag, step, 0.5)) for step in (10, 20) for tag in tags]
        (folder / "events.out.tfevents.1.host").write_bytes(b"".join(data))

    log(root / "run" / "tensorboard" / "dense")
    log(root / "run" / "tensorboard" / "moe")
    log(root / "any" / "tensorboard")
    _log(root / "any" / "train.log")
    for name in ("logs", "converted"):
        (root / "run" / name).mkdir()
    for name in ("evaluate-dense", "evaluate-converted", "evaluate-moe"):
        _log(root / "run" / "logs" / f"{name}.log")
        usage = {"seconds": 1.5, "peak_rss_bytes": 1 << 30}
        (root / "run" / "logs" / f"{name}.usage.json").write_text(json.dumps(usage))
    parity = json.dumps({"logits_max_abs_diff": 2e-6})
    (root / "run" / "converted" / "parity.json").write_text(parity)


def _files(folder: Path) -> None:
    folder.mkdir()
    rows = json.loads((ROOT / "benchmarks" / "results" / "two_gpus_h200.json").read_text())
    rows = [row for row in rows if row["bench"] == "overlap" and row["precision"] == "bf16"]
    (folder / "measured.json").write_text(json.dumps(rows[:4]))
    (folder / "bench.json").write_text(json.dumps(rows[:2]))
    (folder / "prompts.json").write_text(json.dumps([[1, 2, 3], [3, 2]]))
    (folder / "prompts.txt").write_text("experts are chosen\nare experts\n")
    (folder / "schedule.txt").write_text("schedule=own\n--lr\n1e-3\n--train-iters\n100\n")
    script = (
        f"from megatron.training import pretrain  # {pickles.MARK}: read, not run\n\n\n"
        "def provider():\n    pass\n\n\n"
        'if __name__ == "__main__":\n    pretrain(provider)\n'
    )
    (folder / "script.py").write_text(script)


def _unfinished(root: Path) -> None:
    """A conversion that was killed before its folder got its name."""
    (root / "kept").mkdir()
    pid = os.fork()
    if pid == 0:
        rename = Path.rename

        def killed(path: Path, target: Any) -> Path:
            if Path(target).name == "out":
                os._exit(9)
            return rename(path, target)

        Path.rename = killed  # type: ignore[method-assign]
        _run("--from", root / "dense", "--to", root / "kept" / "out", *trees.EXPERTS, *trees.ALONE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
