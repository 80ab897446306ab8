"""A mistake of the user's, and how it is found: on every rank alike, before any communication.

A message has the rule, the names, the values and what to use instead.
"""

import difflib
import re
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """A setting the user can change. Commands print it as one sentence and exit with code 2.

    Names of settings may stand in angle brackets, `<topk>`, or `<topk=4>` for what to use. As text
    they read as in Python, `topk=4`; `spelled` puts other words, such as the flags that were typed.
    """

    def __str__(self) -> str:
        return self.spelled(in_python)

    def spelled(self, word: Callable[[str, str | None], str]) -> str:
        """Return the message with `word(name, value)` for each setting; value None: the name."""
        text = _SETTING.sub(lambda found: word(found[1], found[2]), super().__str__())
        return text.replace(BRACKET, "<")


BRACKET = "\ue000"  # for "<" in what somebody typed, which is no setting
_SETTING = re.compile(r"<([a-z]\w*)(?:=([^<>]*))?>")


def in_python(name: str, value: str | None) -> str:
    """Return a setting as a Python argument."""
    if value is None:
        return name
    bare = value in ("None", "True", "False") or value.replace(".", "", 1).lstrip("-").isdigit()
    return f"{name}={value if bare else repr(value)}"


class BackendUnavailable(ConfigError):
    """A named option exists but its package is not installed."""


def largest_divisor(value: int, at_most: int) -> int:
    """Return the largest divisor of `value` that is at most `at_most`."""
    return next(d for d in range(max(1, min(value, at_most)), 0, -1) if value % d == 0)


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Return up to five of the `known` names that `name` may have meant; toy models come last.

    Those that contain it, else those that are spelled most like it, else all.
    """
    names = list(known)
    near = [other for other in names if name.lower() in other]
    near = near or difflib.get_close_matches(name.lower(), names, n=5) or names
    toys_last = sorted(near, key=lambda other: other.endswith(("-nano", "tiny")))
    return toys_last if near is names else toys_last[:5]


def check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `legal`."""
    if value not in legal:
        raise ConfigError(f"{name} must be one of {', '.join(legal)}; got {repr(value)[:200]}")
