"""The models of the evidence: one a size, and what a variant adds to it."""

import json
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

COMMON = """
--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95
--init-method-std 0.02 --num-workers 0 --tokenizer-type SentencePieceTokenizer
--log-timers-to-tensorboard --ckpt-format torch_dist
--transformer-impl local --no-masked-softmax-fusion --no-gradient-accumulation-fusion
--no-persist-layer-norm --no-rope-fusion --manual-gc
"""
POINTS = 20  # evaluations of a curve
GATE = "--moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32"
TOP1 = (
    f"--moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size {{ffn}} {GATE} {{router}}"
)
TOP2 = f"--moe-router-topk 2 --moe-ffn-hidden-size {{ffn}} {GATE}"
HALF = f"--moe-ffn-hidden-size {{half}} {GATE}"
SCALE = "--moe-router-topk-scaling-factor"


def top1(experts: int) -> str:
    """Return the flags of top-1 of so many experts, gates times their number: 1 at the start.

    A probability alone is 1 / E at the start, and the block almost silent: 8 experts end 0.16 nats
    higher at the CPU size.
    """
    return f"--num-experts {experts} {SCALE} {experts} {TOP1}"


@dataclass(frozen=True)
class Size:
    """A model without experts, its batch, and the tokens of a whole curve."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    sequence: int
    batch: int  # sequences of an iteration
    tokens: int
    lr: float
    heldout: str  # part of the corpus
    on_gpu: bool
    router: str = ""  # flags of every top-1 router at this size, after its common ones

    @property
    def file_name(self) -> str:
        """What it is called in names of files."""
        return self.name.replace("-", "_")

    @property
    def half(self) -> int:
        """Half of the feed-forward block."""
        return self.ffn // 2

    def iterations(self, share: float) -> int:
        """How many iterations a part of the tokens takes."""
        return max(POINTS, round(self.tokens * share / self.batch / self.sequence))

    @property
    def corpus(self) -> str:
        """The folder of data/ that it reads, unless said."""
        return "evidence-large" if self.on_gpu else "evidence"

    def evaluated(self, data: Path) -> int:
        """Return how many batches the held-out part fills; Megatron would count its samples."""
        tokens = json.loads((data / "manifest.json").read_text())[self.heldout]["tokens"]
        return max(1, tokens // self.sequence // self.batch)

    def flags(self, variant: "Variant", seed: int, data: Path) -> list[str]:
        """Return Megatron's flags for a run of the variant, without its own."""
        steps = variant.iterations(self)
        every = "1" if variant.steps else str(max(1, steps // POINTS))
        flags = {
            "num-layers": self.layers,
            "hidden-size": self.hidden,
            "ffn-hidden-size": self.ffn,
            "num-attention-heads": self.heads,
            "seq-length": self.sequence,
            "max-position-embeddings": self.sequence,
            "micro-batch-size": self.batch,
            "global-batch-size": self.batch,
            "lr": self.lr,
            "min-lr": self.lr / 20,
            "train-iters": steps,
            "lr-warmup-iters": max(1, steps // 20),
            "log-interval": every,
            "tensorboard-log-interval": every,
            "eval-interval": every,
            "eval-iters": 0 if variant.steps else self.evaluated(data),
            "seed": seed,
            "tokenizer-model": data / "tokenizer.model",
            "train-data-path": data / "train",
            "valid-data-path": data / self.heldout,
        }
        pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [*shlex.split(COMMON), *pairs, *(["--bf16"] if self.on_gpu else [])]


CPU = Size("cpu", 4, 64, 192, 4, 128, 8, 500_000, 4e-3, "heldout_small", False)
GPU = Size(
    "gpu",
    6,
    384,
    1024,
    6,
    512,
    32,
    100_000_000,
    1e-3,
    "heldout",
    True,
    "--moe-aux-loss-coeff 1e-3",
)
SIZES = {size.name: size for size in (CPU, GPU, replace(GPU, name="gpu-20m", tokens=20_000_000))}


def shrunk(size: Size) -> Size:
    """Return the size with a model and a run of seconds, on the CPU, to see that all works."""
    small = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "sequence": 64, "batch": 16}
    name = f"{size.name}-shrunk"
    return replace(size, name=name, tokens=20480, heldout="heldout_small", on_gpu=False, **small)


@dataclass(frozen=True)
class Variant:
    """One run. Its name stands for its flags in every claim that shows it."""

    name: str
    flags: str = ""  # Megatron's, beyond the size's, with numbers of the size in braces
    share: float = 1.0  # of the size's tokens
    grown_from: str = ""  # the variant whose checkpoint it starts from
    convert: str = ""  # flags of ep-plugin convert, on the way
    teacher: str = ""  # the variant whose checkpoint teaches it
    keep: bool = False  # its checkpoint, for others to start from
    steps: int = 0  # so many, each logged, without evaluation: for times
    ranks: int = 0  # so many on the CPU, which count what they hold

    @property
    def needs(self) -> set[str]:
        """The variants that must have run before."""
        return {self.grown_from, self.teacher} - {""}

    def iterations(self, size: Size) -> int:
        """How many iterations it runs."""
        return self.steps or size.iterations(self.share)

    def formatted(self, text: str, size: Size) -> list[str]:
        """Return the words of a text that has numbers of the size in braces."""
        return shlex.split(
            text.format(
                ffn=size.ffn,
                half=size.half,
                layers=size.layers // 2,
                depth=size.layers,
                fewer=size.layers - 1,
                kept=",".join(map(str, (*range(size.layers - 2), size.layers - 1))),
                fifth=self.iterations(size) // 5,
                router=size.router,
            )
        )

    def extra(self, size: Size) -> list[str]:
        """Return its own flags at a size."""
        return self.formatted(self.flags, size)

    def described(self, size: Size) -> dict[str, object]:
        """Return what a result must agree in to be this variant's at this size."""
        of_size = {name: value for name, value in asdict(size).items() if name != "router"}
        return {**asdict(self), "flags": " ".join(self.extra(size)), "size": of_size}


DENSE = Variant("dense")
E8 = Variant("top1-e8", top1(8), keep=True)
