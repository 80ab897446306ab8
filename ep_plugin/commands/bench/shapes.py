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
FURTHER = (  # measured where they are named; all experts of a model
    Shape("gpt-oss-120b", 8192, 4, 2880, 2880, 128),
    Shape("qwen3-next", 8192, 10, 2048, 512, 512),  # Qwen3-Next-80B-A3B
    Shape("glm-4.5-air", 8192, 8, 4096, 1408, 128),
    Shape("olmoe", 8192, 8, 2048, 1024, 64),  # OLMoE-1B-7B
    Shape("deepseek-v2-lite", 8192, 6, 2048, 1408, 64),
    Shape("mixtral-1024", 1024, 2, 4096, 14336, 8),  # fewer tokens
    Shape("mixtral-256", 256, 2, 4096, 14336, 8),
)
SHAPES = {shape.name: shape for shape in (*MODELS, *FURTHER, TINY)}


def pick(names: list[str]) -> list[Shape]:
    """Return the shapes called so; raises ConfigError for an unknown name."""
    for name in names:
        if name not in SHAPES:
            raise ConfigError(
                f"--shapes must be among {', '.join(SHAPES)}; got {name!r}; use --shapes "
                f"{closest(name, SHAPES)[0]}"
            )
    return [SHAPES[name] for name in names]
