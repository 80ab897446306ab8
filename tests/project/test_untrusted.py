"""JSON and text that somebody else wrote: what is in bounds is read, else one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import (
    MAX_DEPTH,
    cut,
    one_line,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    shown,
)

AGAIN = "copy it again"
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


def refused(text: str, kind: type[Any] = dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "x.json", AGAIN, kind)
    sentence = str(caught.value)
    assert sentence.startswith("x.json ")
    assert sentence.endswith(f"; {AGAIN}")
    assert sentence.isprintable()
    assert len(sentence) < 500
    return sentence


@given(st.dictionaries(st.text(), VALUES), st.booleans())
def test_what_is_in_bounds_is_what_json_reads(value: dict[str, Any], ascii: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii), "x.json", AGAIN) == value


@given(st.dictionaries(st.text(), VALUES), st.data())
def test_damage_is_read_or_refused_in_a_sentence(
    value: dict[str, Any], data: st.DataObject
) -> None:
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(at, len(text)))
    text = text[:at] + data.draw(st.text(max_size=8) | st.sampled_from(TOKENS)) + text[end:]
    try:
        found = parse_json(text, "x.json", AGAIN)
    except ConfigError:
        refused(text)
    else:
        assert found == json.loads(text)
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


TOKENS = (
    "[" * 99,
    '{"a":' * 99,
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 99,
    '"\\ud800"',
    "\0",
    '"a":1,',
)


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, 900, 100_000])
@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}"), ('[{"[{":', "}]")])
def test_depth_is_limited(depth: int, pair: tuple[str, str]) -> None:
    times = depth // (2 if pair[0].startswith("[{") else 1)
    text = f'{{"a": {pair[0] * times}1{pair[1] * times}}}'
    if depth < MAX_DEPTH:
        assert parse_json(text, "x.json", AGAIN) == json.loads(text)
    else:
        assert f"deeper than {MAX_DEPTH}" in refused(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "twice the key 'c'"),
        ('{"a": NaN}', "the number NaN"),
        ('{"a": [-Infinity]}', "the number -Infinity"),
        ('{"a": 1e999}', "1e999, which is infinite"),
        ('{"a": 9223372036854775808}', "more than 64 bits"),
        (f'{{"a": {"1" * 5000}}}', "(5000 characters), which needs more than 64 bits"),
        ('{"a": "\\ud800"}', "surrogates"),
        (f'{{"{"n" * 5000}": 1, "{"n" * 5000}": 1}}', "twice"),
        ("[1]", "no JSON object"),
        ("", "Expecting value"),
        ("[" + "[]," * 1_000_000 + "1]", "more than 1000000 objects"),
    ],
)
def test_what_is_refused_is_named(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"rope": NaN}}', "under 'rope', it has the number NaN"),
        ('{"a": [1, [2, 1e999]]}', "under 'a', it has the number 1e999, which is infinite"),
        ('{"a": 9223372036854775808}', "under 'a', it has the number 9223372036854775808"),
        ('{"a": NaN}\n{', "under 'a', it has the number NaN"),
        ('{"a": 1, "a": 2}', "it has twice the key 'a'"),
    ],
)
def test_a_file_that_is_written_by_hand_is_mended_by_hand(
    text: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"; correct that key in config\.json$") as caught:
        read_json(path, AGAIN, by_hand=True)
    assert said in str(caught.value)
    path.write_text("{")
    with pytest.raises(ConfigError, match=f"; {AGAIN}$"):
        read_json(path, AGAIN, by_hand=True)
    path.write_text('\ufeff{"a": 1}')
    assert read_json(path, AGAIN) == {"a": 1}


def test_a_list_is_read_where_one_is_asked_for() -> None:
    assert parse_json("[1, 2]", "x.json", AGAIN, list) == [1, 2]
    assert "no JSON list" in refused('{"a": 1}', list)


def test_only_files_in_bounds_are_read(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to(good)
    assert read_json(good, AGAIN) == read_json(tmp_path / "link.json", AGAIN) == {"a": 1}
    assert read_bytes(good, AGAIN, 8) == b'{"a": 1}'
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"\xff")
    for name in ("loop", "pipe", "latin", "missing", ".", "good.json/x", "\0", "n" * 5000):
        with pytest.raises(ConfigError, match=f"; {AGAIN}$"):
            read_text(tmp_path / name, AGAIN)
    with pytest.raises(ConfigError, match="more than 7 bytes"):
        read_bytes(good, AGAIN, 7)
    with pytest.raises(ConfigError, match="no regular file"):
        read_bytes(Path("/dev/zero"), AGAIN)


@given(st.text() | st.text(min_size=1).map(lambda text: text * 5000))
def test_what_is_shown_is_short_and_printable(text: str) -> None:
    short = str(ConfigError(shown(text)))
    for found in (cut(text), short, one_line(f"{text[:700]} is wrong; use {text[:700]}")):
        assert found.isprintable()
    assert len(cut(text)) <= 10 * 200 + 30
    if len(text) <= 200 and text.isprintable():
        assert cut(text) == text


def test_long_words_of_a_message_are_cut_and_the_others_are_not() -> None:
    assert one_line("a plain message; use 4") == "a plain message; use 4"
    assert one_line(f"{'n' * 5000} is wrong") == f"{'n' * 200}... (5000 characters) is wrong"
    assert one_line("red \x1b[31m\n") == "red \\x1b[31m\\n"
    names = ", ".join(f"model.layers.{layer}.weight" for layer in range(500))
    assert one_line(names) == names
