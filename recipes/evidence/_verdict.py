"""Whether results support a claim: comparisons of two variants, and what all of them say."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from _show import of, sooner

Results = dict[str, dict[str, Any]]
ONE_SEED = {"loss": 0.005}  # of a value: what one seed of each cannot show
ROUTED = 0.05  # the same, of what routers log
SUPPORTS, CONTRADICTS, UNSURE, ABSENT = "supports", "contradicts", "cannot tell", "not run"


class Judged(NamedTuple):
    """One of the four answers, and the figures that it comes from."""

    answer: str
    figures: str


class Check(Protocol):
    """One comparison of a claim."""

    def judge(self, results: Results) -> Judged:
        """Compare what is there."""

    def said(self, labels: dict[str, str]) -> str:
        """Return what is compared, in the labels' words."""


@dataclass(frozen=True)
class Less:
    """A variant's value is below another's."""

    low: str  # names of variants
    high: str
    value: str = "loss"  # the last held-out one, or what routers log: max_over_mean

    def judge(self, results: Results) -> Judged:
        """Compare the means over seeds; below the noise nothing is told."""
        low, high = (_values(of(results, name), self.value) for name in (self.low, self.high))
        if not low or not high:
            return Judged(ABSENT, "")
        above = statistics.mean(low) - statistics.mean(high)
        noise = _noise(low, high, ONE_SEED.get(self.value, ROUTED))
        figures = f"{above:+.4f}, noise {noise:.4f}"
        if abs(above) <= noise:
            return Judged(UNSURE, figures)
        return Judged(SUPPORTS if above < 0 else CONTRADICTS, figures)

    def said(self, labels: dict[str, str]) -> str:
        """Return the two labels."""
        value = {"loss": "loss", "max_over_mean": "imbalance"}[self.value]
        return f"{value} of {labels[self.low]} below that of {labels[self.high]}"


@dataclass(frozen=True)
class Sooner:
    """A variant stays at another's final loss after at most 1 / times of its tokens."""

    fast: str
    slow: str
    times: float

    def judge(self, results: Results) -> Judged:
        """Read both mean curves, between their points."""
        fast, slow = of(results, self.fast), of(results, self.slow)
        if not fast or not slow:
            return Judged(ABSENT, "")
        seen = sooner(fast, slow)
        if seen is None:
            return Judged(CONTRADICTS, "never")
        return Judged(SUPPORTS if seen >= self.times else CONTRADICTS, f"1/{seen:.2f}")

    def said(self, labels: dict[str, str]) -> str:
        """Return the two labels and the part."""
        part = f"1/{self.times:g} of the tokens"
        return f"{labels[self.fast]} at the final loss of {labels[self.slow]} after {part}"


@dataclass(frozen=True)
class AtMost:
    """All values of a variant are at most `most`; where only some are, or one is, nothing is told.

    One round cannot tell what the machine did beside it.
    """

    name: str
    most: float
    values: Callable[[Results, str], list[float]]

    def judge(self, results: Results) -> Judged:
        """Compare all rounds with the bound."""
        found = self.values(results, self.name)
        if not found:
            return Judged(ABSENT, "")
        rounds = "1 round" if len(found) == 1 else f"{len(found)} rounds"
        figures = f"{statistics.median(found):.2f} in {rounds}"
        if len(found) == 1 or min(found) <= self.most < max(found):
            return Judged(UNSURE, figures)
        return Judged(SUPPORTS if max(found) <= self.most else CONTRADICTS, figures)

    def said(self, labels: dict[str, str]) -> str:
        """Return the label and the bound."""
        return f"{labels[self.name]}: at most {self.most:g} times dense"


@dataclass(frozen=True)
class Equal:
    """What a variant counted is what the rule says, to the last one."""

    name: str
    exact: Callable[[Results, str], bool | None]

    def judge(self, results: Results) -> Judged:
        """Ask whether it is."""
        exact = self.exact(results, self.name)
        if exact is None:
            return Judged(ABSENT, "")
        return Judged(SUPPORTS, "equal") if exact else Judged(CONTRADICTS, "not equal")

    def said(self, labels: dict[str, str]) -> str:
        """Return the label."""
        return f"{labels[self.name]}, every rank beside the rule"


def _values(runs: list[dict[str, Any]], value: str) -> list[float]:
    if value == "loss":
        return [run["heldout"][-1][1] for run in runs if run["heldout"]]
    return [run["experts"][value] for run in runs if value in run["experts"]]


def _noise(low: list[float], high: list[float], one_seed: float) -> float:
    """Return two standard errors of the difference; of one seed a share of the value."""
    if min(len(low), len(high)) < 2:
        return one_seed * statistics.mean(high)
    return 2.0 * sum(statistics.variance(x) / len(x) for x in (low, high)) ** 0.5


def whole(answers: Iterable[str]) -> str:
    """Return what several answers say together."""
    answers = list(answers)
    told = {answer for answer in answers if answer in (SUPPORTS, CONTRADICTS)}
    if told == {SUPPORTS, CONTRADICTS}:
        return "in part supports and in part contradicts the claim"
    if told:
        rest = "" if len(told) == len(set(answers)) else " as far as it can tell"
        return f"{told.pop()} the claim{rest}"
    if UNSURE in answers:
        return "cannot tell: differences are below the noise, or of one round"
    return "cannot tell: not run"


def verdict(checks: Iterable[Check], results: Results, labels: dict[str, str]) -> str:
    """Return what all comparisons say in a line, and a list of them."""
    judged = [(check.said(labels), *check.judge(results)) for check in checks]
    lines = [f"- {said}: {figures}, {answer}" for said, answer, figures in judged if figures]
    missing = [said for said, answer, _ in judged if answer == ABSENT]
    if missing:
        lines.append(f"- not run: {len(missing)} of {len(judged)} comparisons")
    return "\n".join([f"What was seen **{whole(x for _, x, _ in judged)}**.", "", *lines]) + "\n"
