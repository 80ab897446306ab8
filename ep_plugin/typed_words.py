"""Words behind flags, and one sentence for a wrong one: the flag, what was typed, what to type.

What reads a word raises WrongWord, as "must be a whole number; got 'two'; use 2". argparse puts
the flag in front in words of its own. `sentence` makes of that "--tp must be a whole number; got
'two'; use --tp 2".
"""

import argparse
import contextlib
import difflib
import re
from collections.abc import Collection, Iterable

from ep_plugin.errors import BRACKET, ConfigError, closest
from ep_plugin.typed import LARGEST_INT
from ep_plugin.untrusted import shown

WrongWord = argparse.ArgumentTypeError
_ABOUT = re.compile(r"argument (?P<flag>[^\s:]+): (?P<fault>.*)", re.DOTALL)
_VALUES = {  # argparse's words for how many values stand behind a flag
    "expected one argument": "{flag} needs a value; use {flag} VALUE",
    "expected at least one argument": "{flag} needs a value; use {flag} VALUE",
    "ignored explicit argument": "{flag} takes no value; use {flag} alone",
}


def whole(text: str, use: int = 2) -> int:
    """Read a whole number; `use` is one to type instead."""
    try:
        return int(text)
    except ValueError:
        pass
    rule = "a whole number"
    if text.strip().lstrip("+-").isdecimal():  # more digits than Python reads
        rule += f" up to {LARGEST_INT}"
    with contextlib.suppress(ValueError):
        if (meant := float(text)).is_integer() and abs(meant) <= LARGEST_INT:
            use = int(meant)
    raise WrongWord(f"must be {rule}; got {shown(text)}; use {use}")


def number(text: str, use: float = 0.5) -> float:
    """Read a number; `use` is one to type instead."""
    try:
        return float(text)
    except ValueError:
        raise WrongWord(f"must be a number; got {shown(text)}; use {use:g}") from None


def one_of(text: str, legal: Collection[str]) -> str:
    """Read one of the `legal` words."""
    if text not in legal:
        near = closest(text, legal)[0]
        raise WrongWord(f"must be one of {', '.join(legal)}; got {shown(text)}; use {near}")
    return text


def unknown(words: list[str], flags: Iterable[str]) -> str:
    """Return what is wrong with words that a parser with these flags does not know."""
    typed = words[0].partition("=")[0]
    if not typed.startswith("-"):
        return f"{shown(' '.join(words))} is more than it takes; leave it out"
    near = difflib.get_close_matches(typed, flags, n=1, cutoff=0.75)
    return f"{shown(typed)} is no flag here; {f'use {near[0]}' if near else 'leave it out'}"


def sentence(message: str) -> ConfigError:
    """Return what argparse says of a command line as a sentence that begins with the flag."""
    about = _ABOUT.fullmatch(message)
    if about is not None:
        return of_flag(about["flag"], about["fault"])
    use = "; use one of them" if message.startswith("ambiguous option: ") else ""
    return ConfigError(message.replace("<", BRACKET) + use)  # typed, and no setting of ours


def of_flag(flag: str, fault: str) -> ConfigError:
    """Return what is wrong with the words behind a flag, as a sentence."""
    fault = fault.replace("<", BRACKET)
    for begin, said in _VALUES.items():
        if fault.startswith(begin):
            return ConfigError(said.format(flag=flag))
    rule, use, value = fault.rpartition("; use ")
    if use and flag.startswith("-"):
        return ConfigError(f"{flag} {rule}{use}{flag} {value}")
    return ConfigError(f"{flag} {fault}" if fault.startswith("must ") else f"{flag}: {fault}")
