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
    What nobody would read to its end, such as a value of 5,000 characters, is cut.
    """

    def __str__(self) -> str:
        return self.spelled(in_python)

    def spelled(self, word: Callable[[str, str | None], str]) -> str:
        """Return the message with `word(name, value)` for each setting; value None: the name."""
        text = _SETTING.sub(lambda found: word(found[1], found[2]), super().__str__())
        return _middle_cut(long_words_cut(text.replace(BRACKET, "<")))


def long_words_cut(text: str) -> str:
    """Return the text with words of 600 characters and more cut to 200, and their length."""
    return _LONG_WORD.sub(lambda word: f"{word[0][:200]}... ({len(word[0])} characters)", text)


def _middle_cut(text: str) -> str:
    over = len(text) - _LONGEST
    if over <= 0:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} ... ({over} characters) ... {text[-half:]}"


_LONGEST = 3500
_LONG_WORD = re.compile(r"\S{600,}")
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
