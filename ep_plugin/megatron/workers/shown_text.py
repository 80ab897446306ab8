"""Texts while they are made: where each ends, and what of it is shown."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ep_plugin.checkpoint.text import Tokenizer

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # by a terminal
HALF = "\ufffd"  # how a character is decoded of which bytes are still to come


class Growing:
    """One prompt and what follows; `reason` says why it ended: length, stop, end_of_document."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self.tokenizer, self.prompt, self.ids, self.stop = tokenizer, prompt, list(ids), stop
        self.tokens: list[int] = []
        self.text = ""
        self.reason: str | None = None
        self._before = tokenizer.decode(self.ids)

    def add(self, token: int) -> None:
        """Take one more token."""
        if token == self.tokenizer.end:
            self.end("end_of_document")
            return
        self.tokens.append(token)
        whole = self.tokenizer.decode([*self.ids, *self.tokens])
        self.text = whole[len(self._before) :] if whole.startswith(self._before) else whole
        found = [place for word in self.stop if (place := self.text.find(word)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.end("stop")

    def end(self, reason: str) -> None:
        """Take no more; the first reason stays."""
        self.reason = self.reason or reason

    @property
    def certain(self) -> str:
        """What of the text later tokens cannot change, nor a stop text cut."""
        if self.reason is not None:
            return self.text
        text = self.text.rstrip(HALF)
        held = max(
            (n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n])),
            default=0,
        )
        return text[: len(text) - held]


class Shown:
    """One text as it grows; several, a line each, in their order; with `as_json` always lines."""

    def __init__(
        self,
        texts: Sequence[Growing],
        as_json: bool,
        write: Callable[[str], Any],
        clock: Callable[[], float],
    ) -> None:
        self.texts, self.as_json, self.write, self.clock = texts, as_json, write, clock
        self.streams = len(texts) == 1 and not as_json
        self.started, self.lines, self.length = clock(), 0, 0
        self.seconds = [0.0] * len(texts)

    def begin(self) -> None:
        """Show the prompt of a single text."""
        self.started = self.clock()
        if self.streams:
            self.write(_plain(self.texts[0].prompt))

    def update(self) -> None:
        """Show what is new."""
        for number, text in enumerate(self.texts):
            if text.reason is not None and not self.seconds[number]:
                self.seconds[number] = max(self.clock() - self.started, 1e-9)
        if self.streams:
            (text,) = self.texts
            self.write(_plain(text.certain[self.length :]) + "\n" * (text.reason is not None))
            self.length = len(text.certain)
            return
        while self.lines < len(self.texts) and self.texts[self.lines].reason is not None:
            self.write(self._line(self.lines) + "\n")
            self.lines += 1

    def _line(self, number: int) -> str:
        text = self.texts[number]
        if not self.as_json:
            return f"{number + 1}: {_json(text.prompt + text.text)}"
        return _json(
            {
                "prompt": text.prompt,
                "text": text.text,
                "tokens": text.tokens,
                "reason": text.reason,
                "tokens_per_second": round(len(text.tokens) / self.seconds[number], 2),
            }
        )


def _plain(text: str) -> str:
    """Return a text with what a terminal would obey spelled out; lines and tabs stay."""
    return _OBEYED.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _json(value: Any) -> str:
    """Return JSON that no terminal obeys, and that says the same."""
    text = json.dumps(value, ensure_ascii=False)
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
