"""Settings whose result depends on the layout by nature: what is compared in their place.

A loss that is counted over data-parallel ranks, an expert that fills up by what one rank has, and
random numbers are right at every layout, and other numbers at each. `ROWS` has them all: a test
tries each flag of the table alone at two layouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import gcd

from ep_plugin.commands.parity.comparable import is_number, value, values, without
from ep_plugin.commands.parity.layouts import Layout
from ep_plugin.moe.parallel import ParallelConfig

BALANCING, COEFFICIENTS = "--moe-router-load-balancing-type", "--moe-aux-loss-coeff"
SCOPE, FURTHER = "--ep-aux-loss-scope", "--ep-further-losses"
GROUP_TOKENS, SEQUENCE = "--ep-group-tokens", "--seq-length"
CAPACITY = ("--ep-capacity-factor", "--moe-expert-capacity-factor")  # in training


@dataclass(frozen=True)
class SetAside:
    """A setting as it was given, what is compared instead, and why."""

    given: str
    instead: str
    why: str

    @property
    def text(self) -> str:
        return f"{self.given}: {self.why}; compared {self.instead}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """A value of a flag that means other numbers at some layouts."""

    flag: str
    value: str
    instead: str | None  # another value of the flag; None: without the flag
    why: str
    differs: Callable[[ParallelConfig], bool]


def _anywhere(parallel: ParallelConfig) -> bool:
    return parallel.world_size > 1


def _over_batches(parallel: ParallelConfig) -> bool:
    return parallel.dp > 1


def _over_tokens(parallel: ParallelConfig) -> bool:
    return parallel.tp * parallel.cp > 1


_DRAWS = "draws random numbers, and each rank has its own"
_STEP = "counts over what all data-parallel ranks have had of the step"
ROWS = (
    Row("--ep-second-expert", "sampling", None, _DRAWS, _anywhere),
    Row("--ep-second-expert", "random", "threshold", _DRAWS, _anywhere),
    Row("--ep-drop-policy", "random", "position", _DRAWS, _anywhere),
    Row(
        "--dataloader-type",
        "cyclic",
        "single",
        "gives each data-parallel rank its own part of the data",
        _over_batches,
    ),
    Row(
        "--muon-tp-mode",
        "blockwise",
        "duplicated",
        "orthogonalises the part of a matrix that a rank has",
        lambda parallel: parallel.tp * parallel.expert_tp > 1,
    ),
)


def set_aside(arguments: list[str], layouts: Sequence[Layout]) -> tuple[list[str], list[SetAside]]:
    """Return the flags without what differs at these layouts by nature, and what that was."""
    found: list[SetAside] = []
    for row in ROWS:
        if value(arguments, row.flag) == row.value and any(
            row.differs(x.parallel) for x in layouts
        ):
            arguments, _ = without(arguments, (row.flag,))
            if row.instead is not None:
                arguments = [*arguments, row.flag, row.instead]
            instead = f"with {row.flag} {row.instead}" if row.instead else "without it"
            found.append(SetAside(f"{row.flag} {row.value}", instead, row.why))
    for change in (_megatron_s_loss, _own_loss, _muon, _capacity):
        arguments, more = change(arguments, layouts)
        found += more
    return arguments, found


def _megatron_s_loss(
    arguments: list[str], layouts: Sequence[Layout]
) -> tuple[list[str], list[SetAside]]:
    """Leave the global loss out, of one or of several; Megatron's default takes its place."""
    losses, coefficients = values(arguments, BALANCING), values(arguments, COEFFICIENTS)
    if "global_aux_loss" not in losses or not any(_over_batches(x.parallel) for x in layouts):
        return arguments, []
    arguments, _ = without(arguments, (BALANCING, COEFFICIENTS))
    place = losses.index("global_aux_loss")
    if len(losses) > 1:
        losses = [*losses[:place], *losses[place + 1 :]]
        coefficients = [*coefficients[:place], *coefficients[place + 1 :]]
    else:
        losses = ["aux_loss"]
    arguments = [*arguments, BALANCING, *losses]
    if coefficients:
        arguments += [COEFFICIENTS, *coefficients]
    instead = f"with {BALANCING} {' '.join(losses)}"
    return arguments, [SetAside(f"{BALANCING} global_aux_loss", instead, _STEP)]


def _own_loss(arguments: list[str], layouts: Sequence[Layout]) -> tuple[list[str], list[SetAside]]:
    """The same of the plugin's own flags: one scope, and further ones with a coefficient each."""
    if not any(_over_batches(x.parallel) for x in layouts):
        return arguments, []
    found = []
    further = [part for part in (value(arguments, FURTHER) or "").split(",") if part]
    left = [part for part in further if not part.startswith("global:")]
    scope = None
    if value(arguments, SCOPE) == "global":
        taken = [part.partition(":")[0] for part in left]
        scope = next((s for s in ("micro_batch", "sequence") if s not in taken), None)
        if scope is None:  # one of the further losses takes its place
            scope, left = taken[0], left[1:]
    if len(left) < len(further):
        arguments, _ = without(arguments, (FURTHER,))
        arguments = [*arguments, *((FURTHER, ",".join(left)) if left else ())]
        instead = f"with {FURTHER} {','.join(left)}" if left else "without it"
        found.append(SetAside(f"{FURTHER} {','.join(further)}", instead, _STEP))
    if scope is not None:
        arguments, _ = without(arguments, (SCOPE,))
        arguments = [*arguments, SCOPE, scope]
        found.append(SetAside(f"{SCOPE} global", f"with {SCOPE} {scope}", _STEP))
    return arguments, found


def _muon(arguments: list[str], layouts: Sequence[Layout]) -> tuple[list[str], list[SetAside]]:
    """Choose how Muon treats a matrix that is spread, where Megatron's default is blockwise."""
    row = next(row for row in ROWS if row.flag == "--muon-tp-mode")
    named = "muon" in (value(arguments, "--optimizer") or "")
    if not named or value(arguments, row.flag) is not None:
        return arguments, []
    if not any(row.differs(x.parallel) for x in layouts):
        return arguments, []
    aside = SetAside(f"{row.flag} {row.value}", f"with {row.flag} {row.instead}", row.why)
    return [*arguments, row.flag, str(row.instead)], [aside]


def _capacity(arguments: list[str], layouts: Sequence[Layout]) -> tuple[list[str], list[SetAside]]:
    """Let groups of tokens that no layout cuts have a capacity, and a loss of their own.

    A group is of one sequence, whose tokens context parallelism deals out in 2*cp parts, and
    tensor parallelism each rank's in tp.
    """
    losses = value(arguments, SCOPE) == "group" or "group:" in (value(arguments, FURTHER) or "")
    counted = losses or any(value(arguments, flag) is not None for flag in CAPACITY)
    length, tokens = value(arguments, SEQUENCE), value(arguments, GROUP_TOKENS)
    if not all(number is None or is_number(number) for number in (length, tokens)):
        return arguments, []  # which the run refuses in its own words
    if not counted or length is None or not any(_over_tokens(x.parallel) for x in layouts):
        return arguments, []
    part = int(length)
    for parallel in (layout.parallel for layout in layouts):
        part = gcd(part, int(length) // (parallel.tp * (2 * parallel.cp if parallel.cp > 1 else 1)))
    part = gcd(part, int(tokens)) if tokens is not None else part
    if tokens == str(part):
        return arguments, []
    arguments, _ = without(arguments, (GROUP_TOKENS,))
    given = "a capacity of a rank's tokens" if tokens is None else f"{GROUP_TOKENS} {tokens}"
    why = "tensor and context parallelism cut such a group"
    aside = SetAside(given, f"with {GROUP_TOKENS} {part}", why)
    return [*arguments, GROUP_TOKENS, str(part)], [aside]
