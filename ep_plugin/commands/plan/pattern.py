"""A `--hybrid-layer-pattern` as `plan` reads it: segments between `|`, prediction behind `/`."""

from dataclasses import dataclass

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

FLAG = "--hybrid-layer-pattern"
MOST = 1 << 12  # layers of a pattern, of which each is counted
NAMES = {
    "*": "attention",
    "+": "latent attention",
    "M": "Mamba",
    "G": "gated delta net",
    "-": "dense block",
    "E": "experts",
}
LEGAL = f"use {', '.join(NAMES)}, with | where stages are cut and / before multi-token prediction"


@dataclass(frozen=True)
class Pattern:
    """The layers of a HybridModel."""

    text: str
    segments: tuple[str, ...]  # of the decoder, one for each stage or virtual stage
    predicting: str  # layers of one depth of multi-token prediction
    depths: int

    @property
    def decoder(self) -> str:
        return "".join(self.segments)

    @property
    def symbols(self) -> str:
        return self.decoder + self.predicting

    def cut(self, pp: int) -> list[list[str]]:
        """Return for each of `pp` stages its segments, one for each virtual stage."""
        segments = self.segments
        if len(segments) == 1:  # as Megatron cuts a pattern without |
            count = len(segments[0]) // pp
            segments = tuple(segments[0][i * count : (i + 1) * count] for i in range(pp))
        return [list(segments[stage::pp]) for stage in range(pp)]

    def can_be_cut(self, pp: int) -> bool:
        """Whether Megatron runs it on `pp` stages."""
        if len(self.segments) == 1:
            return len(self.decoder) % pp == 0
        return len(self.segments) % pp == 0 and pp > 1


def parse(text: str) -> Pattern:
    """Return the parts of a pattern; raises ConfigError for what Megatron or the plugin refuses."""
    decoder, *predicting = text.split("/")
    if len(text) > MOST:
        raise ConfigError(f"{FLAG} has {len(text)} symbols; use at most {MOST}")
    if not decoder.replace("|", ""):
        raise ConfigError(f"{FLAG} {shown(text)} has no layer before the first /; {LEGAL}")
    for symbol in (*decoder.replace("|", ""), *"".join(predicting)):
        if symbol == "D":
            raise ConfigError(
                f"{FLAG} {shown(text)} has D, DeepSeek's sparse attention, which plan cannot "
                f"count; {LEGAL}"
            )
        if symbol not in NAMES:
            where = " behind /" if symbol == "|" else ""
            raise ConfigError(f"{FLAG} {shown(text)} has {shown(symbol)}{where}; {LEGAL}")
    if any(part != predicting[0] or not part for part in predicting):
        raise ConfigError(
            f"{FLAG} {shown(text)} has other layers behind one / than behind another, or none; "
            f"use {FLAG} '{'/'.join([decoder, *[max(predicting, key=len)] * len(predicting)])}'"
            if any(predicting)
            else f"{FLAG} {shown(text)} has no layers behind /; use {FLAG} '{decoder}'"
        )
    found = Pattern(text, tuple(decoder.split("|")), predicting[0] if predicting else "", 0)
    found = Pattern(text, found.segments, found.predicting, len(predicting))
    if "*" in found.symbols and "+" in found.symbols:
        raise ConfigError(
            f"{FLAG} {shown(text)} has * and +, and a HybridModel has one kind of attention; use "
            f"{FLAG} '{text.replace('+', '*')}'"
        )
    if "E" in found.predicting:
        raise ConfigError(
            f"{FLAG} {shown(text)} has experts behind /, which are not served in a HybridModel; "
            f"use {FLAG} '{decoder}/{'/'.join(predicting).replace('E', '-')}'"
        )
    return found
