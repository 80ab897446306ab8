"""Sizes that published models give one rank; `tiny` runs anywhere."""

from dataclasses import dataclass

from ep_plugin.errors import ConfigError, closest


@dataclass(frozen=True)
class Shape:
    """What one rank computes: its tokens, and its experts."""

    name: str
    tokens: int  # T
    topk: int  # K
    hidden: int  # H
    ffn: int  # F of one expert
    experts: int  # e

    @property
    def rows(self) -> int:
        """Rows of all experts, T * K."""
        return self.tokens * self.topk

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of both linear maps of a SwiGLU expert."""
        return {"fc1": (self.hidden, 2 * self.ffn), "fc2": (self.ffn, self.hidden)}


TINY = Shape("tiny", 64, 2, 128, 128, 4)
MODELS = (
    Shape("dsv3", 8192, 4, 7168, 2048, 8),  # DeepSeek-V3
    Shape("q3-235b", 8192, 8, 4096, 1536, 16),  # Qwen3-235B-A22B at ep = 8
    Shape("q3-30b-ep8", 8192, 8, 2048, 768, 16),  # Qwen3-30B-A3B at ep = 8
    Shape("q3-30b", 8192, 8, 2048, 768, 128),  # all of its experts
    Shape("mixtral", 8192, 2, 4096, 14336, 8),  # Mixtral 8x7B
)
SHAPES = {shape.name: shape for shape in (*MODELS, TINY)}


def pick(names: list[str]) -> list[Shape]:
    """Return the shapes called so; raises ConfigError for an unknown name."""
    for name in names:
        if name not in SHAPES:
            raise ConfigError(
                f"--shapes must be among {', '.join(SHAPES)}; got {name!r}; use --shapes "
                f"{closest(name, SHAPES)[0]}"
            )
    return [SHAPES[name] for name in names]
