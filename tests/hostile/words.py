"""SentencePiece models with something planted in them."""

import random
from pathlib import Path
from typing import Any

from tests.hostile import pickles, texts


def sentencepiece_file(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of a SentencePiece model."""
    kind = rng.choice(("edited", "edited", "edited", "damaged", "pickle", "raw"))
    if kind == "damaged":
        return "words: damaged", pickles.damaged(rng, benign)[1]
    if kind == "pickle":
        return "words: pickle", pickles.planted(rng, outside, b"\x80\x04N.")[1]
    if kind == "raw":
        nested = b"\x0a" + b"\xff" * 9 + b"\x01"
        return "words: raw", rng.choice((b"", b"{}", rng.randbytes(3000), nested, b"\0" * 4096))
    return "words: edited", _edited(rng, outside, benign)


def _edited(rng: random.Random, outside: Path, benign: bytes) -> bytes:
    """Return a right file of the right kind with other pieces, kinds, scores or settings."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(benign)
    words = [*texts.shell(outside), *texts.HTML, "\x1b]0;x\x07", "\x9b2J", "", "\u2581" * 5000]
    words = [word for word in words if "\udcff" not in word]
    for _ in range(rng.choice((1, 2, 8))):
        piece, act = rng.choice(model.pieces), rng.randrange(7)
        if act == 0:
            piece.piece = rng.choice(words)
        elif act == 1:
            piece.type = rng.randrange(1, 7)
        elif act == 2:
            piece.score = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38))
        elif act == 3:
            spec = model.trainer_spec
            for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
                setattr(spec, name, rng.choice((-1, 0, 1, 1 << 30, -(1 << 31))))
        elif act == 4:
            model.trainer_spec.model_type = rng.randrange(1, 5)
            model.trainer_spec.byte_fallback = rng.random() < 0.5
        elif act == 5:
            spec = rng.choice((model.normalizer_spec, model.denormalizer_spec))
            spec.precompiled_charsmap = rng.choice((b"", b"\xff" * 64, rng.randbytes(3000)))
            spec.normalization_rule_tsv = rng.choice(words)
        else:
            del model.pieces[rng.randrange(len(model.pieces)) :]
            model.pieces.add().piece = rng.choice(words)
    return bytes(model.SerializeToString())
