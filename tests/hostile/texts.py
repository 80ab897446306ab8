"""JSON, headers of safetensors and plain text with something planted in them."""

import json
import random
import struct
from pathlib import Path
from typing import Any

from tests.hostile import pickles

HTML = (
    f"<script>{pickles.MARK}()</script>",
    f'"><img src=x onerror={pickles.MARK}()>',
    f"</title></style><svg/onload={pickles.MARK}()>",
    f"<a href=javascript:{pickles.MARK}()>x</a>",
    f"<!--<iframe src=http://{pickles.MARK}.invalid>",
    f"&lt;{pickles.MARK}&#60;script&#62;",
)


# Keys by which transformers finds code or files elsewhere.
CODE = {
    "auto_map": {
        "AutoConfig": f"{pickles.MODULE}.Config",
        "AutoModelForCausalLM": f"nobody/{pickles.MARK}--{pickles.MODULE}.Model",
        "AutoTokenizer": [f"{pickles.MODULE}.Slow", f"{pickles.MODULE}.Fast"],
    },
    "custom_pipelines": {pickles.MARK: {"impl": f"{pickles.MODULE}.Pipeline"}},
    "tokenizer_file": f"nobody/{pickles.MARK}",
    "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "base_model_name_or_path": f"nobody/{pickles.MARK}",
}
# Keys by which its tokenizers open files, packages and classes, with a path in place of each PATH.
PATH = object()
OPENED: dict[str, Any] = {
    "vocab_file": PATH, "merges_file": PATH, "vocab": PATH, "merges": PATH, "gguf_file": PATH,
    "fast_tokenizer_files": ["tokenizer.4.0.0.json"], "name_or_path": PATH, "tokenizer_file": PATH,
    "special_tokens_map_file": PATH, "added_tokens_file": PATH, "init_inputs": [PATH],
    "sp_model_kwargs": {"model_file": PATH}, "word_tokenizer_type": "mecab",
    "mecab_kwargs": {"mecab_option": f"-r /dev/zero -o {pickles.MARK}"}, "trust_remote_code": True,
    "local_files_only": False, "backend": PATH, "_commit_hash": PATH, "tokenizer_object": {},
    "model_type": "bert-japanese",
}  # fmt: skip
KINDS = (
    "BertJapaneseTokenizer", "FlaubertTokenizer", "XLMTokenizer", "Wav2Vec2PhonemeCTCTokenizer",
    "BioGptTokenizer", "RagTokenizer", "MistralCommonBackend", "LlamaTokenizer", "os.system",
    "LlamaTokenizerFast", f"{pickles.MODULE}.Tokenizer", "", "__class__",
)  # fmt: skip


def shell(outside: Path) -> list[str]:
    """Return words that a shell would run, where a word is expected."""
    made = outside / pickles.MARK
    return [
        f"$(touch {made})", f"`touch {made}`", f"; touch {made};", f"x\ntouch {made}",
        f"x && touch {made}",
        f"x | touch {made}", f"'; touch {made}; '", f"\"; touch {made}; \"", f"> {made}",
        f"x[$(touch {made})]",
        f"${{x:=$(touch {made})}}", f"$((x[$(touch {made})]))", "-e", "--", "~", "*", "!!", "$IFS",
        "\\", "\t",
        f"-n\n$(touch {made})", f"a=$(touch {made})", "%s%n", f"<(touch {made})", f"\0touch {made}",
    ]  # fmt: skip


def paths(outside: Path) -> list[str]:
    """Return names of files that lead elsewhere; `outside` has such files."""
    return [
        "../outside/file", "../../outside/file", str(outside / "file"), "/etc/hostname",
        "/dev/zero",
        "/dev/stdin", "/proc/self/environ", "/proc/self/mem", "..", ".", "", "/", "~/file",
        "file:///etc/hostname",
        "http://127.0.0.1:9/x", f"x\0{pickles.MARK}", "x" * 5000, "a/" * 2000 + "a",
        f"line\n{pickles.MARK}",
        "CON", "\udcff", str(outside / "pipe"), str(outside / "loop"), "../../../../../../dev/zero",
        f"{pickles.MODULE}.name", "os.system", f"{pickles.MODULE}:name", "-rf", "--help",
    ]  # fmt: skip


def value(rng: random.Random, outside: Path) -> Any:
    """Return a value of any type, mostly not what a key should have."""
    numbers = (
        *(None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 60, 1 << 70, -(1 << 63), 10**9, 0.5),
        *(float("nan"), float("inf"), -0.0, 1e308, 5e-324, 3.5),
    )
    kind = rng.randrange(6)
    if kind < 2:
        return rng.choice(numbers)
    if kind == 2:
        return rng.choice((*HTML, *shell(outside), *paths(outside)))
    if kind == 3:
        return rng.choice(
            ([], {}, [None], {"": None}, [[[]]], [0] * 5000, {"a": {"b": {}}}, [1, "x", None])
        )
    if kind == 4:
        return [value(rng, outside) for _ in range(rng.randrange(3))]
    return {str(rng.choice(paths(outside))): value(rng, outside)}


def _places(document: Any, limit: int = 400) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in a document, the first ones of a long one."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting and len(found) < limit:
        one = waiting.pop(0)
        keys = (
            list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        )
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def edited(rng: random.Random, outside: Path, document: Any) -> Any:
    """Return a copy of a document with a few values, keys or parts replaced."""
    copy = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(copy)
        if not places:
            return value(rng, outside)
        container, key = rng.choice(places)
        act = rng.randrange(5)
        if act == 0 and isinstance(container, dict):
            container[str(rng.choice(paths(outside)))] = container.pop(key)
        elif act == 1 and isinstance(container, dict):
            del container[key]
        elif act == 2 and isinstance(container, list):
            container.append(value(rng, outside))
        else:
            container[key] = value(rng, outside)
    return copy


def whole(rng: random.Random, outside: Path) -> bytes:
    """Return a text that is no document at all, or one that is costly to read."""
    deep = rng.choice((100, 5_000, 100_000))
    return rng.choice(
        (
            b"", b"null", b"[]", b"{}", b"0", b'""', b"[" * deep, b'{"a":' * deep,
            b"[" * deep + b"]" * deep,
            b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"\0" * 100, b"9" * 10_000, b"1e" + b"9" * 400,
            b'{"a": 1, "a": 2}', b'{"a": ' + b"1" * 5000 + b"}", b"NaN", b"[1,]", b"{'a': 1}",
            b'"\\ud800"',
            b'{"a": "' + b"x" * 1_000_000 + b'"}', b"[" + b"0," * 50_000 + b"0]",
            rng.randbytes(300),
            pickles.planted(rng, outside, b"\x80\x04N.")[1],
        )
    )  # fmt: skip


def _opened(rng: random.Random, outside: Path) -> dict[str, Any]:
    """Return a few settings of a tokenizer that lead elsewhere."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return rng.choice(paths(outside)) if value is PATH else value

    found = {key: filled(OPENED[key]) for key in rng.sample(list(OPENED), rng.choice((1, 2, 20)))}
    return found | ({"tokenizer_class": rng.choice(KINDS)} if rng.random() < 0.7 else {})


def json_file(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of a JSON file."""
    kind = rng.choices(("edited", "whole", "damaged", "code"), (14, 4, 2, 4))[0]
    if kind == "code":
        named = json.loads(benign)
        keys = dict(CODE) if rng.random() < 0.3 else _opened(rng, outside)
        return "JSON: code", json.dumps(
            {**named, **keys} if isinstance(named, dict) else keys
        ).encode()
    if kind == "whole":
        return "JSON: whole", whole(rng, outside)
    if kind == "damaged":
        return "JSON: damaged", pickles.damaged(rng, benign)[1]
    document = edited(rng, outside, json.loads(benign))
    return "JSON: edited", json.dumps(document, ensure_ascii=True).encode()


def json_lines(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of a file with a document on each line."""
    lines = benign.splitlines() or [b"{}"]
    number = rng.randrange(len(lines))
    kind, lines[number] = json_file(rng, outside, lines[number])
    if rng.random() < 0.2:
        lines.append(lines[0])
    return f"lines of {kind}", b"\n".join(lines) + b"\n"


def _entry(rng: random.Random) -> dict[str, Any]:
    size = rng.choice(((1 << 62, 1), (1 << 40, 1 << 40), (-1, 4), (0,), (4,), (1,) * 100, ()))
    offsets = rng.choice(([0, 16], [0, 1 << 40], [16, 0], [-8, 8], [0], [0, 1 << 64], [8, 24]))
    words = ("F32", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "X9", "", "f32", "C64")
    return {"dtype": rng.choice(words), "shape": list(size), "data_offsets": offsets}


def safetensors_file(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of a safetensors file: the length of its header, the header, or both."""
    (size,) = struct.unpack("<Q", benign[:8])
    header, data = json.loads(benign[8 : 8 + size]), benign[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(("length", "edited", "entry", "names", "whole", "damaged", "twice", "data"))
    if kind == "damaged":
        return "header: damaged", pickles.damaged(rng, benign)[1]
    if kind == "length":
        length = rng.choice(
            (0, 1, size - 1, size + 1, len(benign), 1 << 27, 1 << 40, (1 << 64) - 1)
        )
        return "header: length", struct.pack("<Q", length) + benign[8:]
    if kind == "edited":
        text = json.dumps(edited(rng, outside, header)).encode()
    elif kind == "entry":
        text = json.dumps(header | {rng.choice(names): _entry(rng)}).encode()
    elif kind == "names":
        name = str(rng.choice((*paths(outside), *HTML)))
        header[name] = header.pop(rng.choice(names))
        text = json.dumps(header).encode()
    elif kind == "twice":
        name = rng.choice(names)
        more = json.dumps({name: header[name]}).encode()[1:]
        text = json.dumps(header).encode()[:-1] + b"," + more
    elif kind == "whole":
        text = whole(rng, outside)
    else:
        text, data = (
            json.dumps(header).encode(),
            rng.choice((b"", data[:-1], data + b"x", data * 2)),
        )
    return f"header: {kind}", struct.pack("<Q", len(text)) + text + data


def text_file(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of a text of lines, such as a tracker, a log or a list of words."""
    words = (
        *HTML,
        *shell(outside),
        *paths(outside),
        "nan",
        "inf",
        "-1",
        "9" * 5000,
        "\u202e",
        "1_0",
    )
    lines = benign.decode(errors="replace").splitlines() or [""]
    kind = rng.choice(("word", "line", "one line", "long", "damaged", "raw"))
    if kind == "damaged":
        return "text: damaged", pickles.damaged(rng, benign)[1]
    if kind == "raw":
        return "text: raw", rng.choice((b"", b"\0", rng.randbytes(2000), b"\xff\xfe", b"\r" * 100))
    number = rng.randrange(len(lines))
    if kind == "word":
        parts = lines[number].split(" ")
        parts[rng.randrange(len(parts))] = rng.choice(words)
        lines[number] = " ".join(parts)
    elif kind == "line":
        lines.insert(number, rng.choice(words))
    elif kind == "one line":
        lines = [rng.choice(words)]
    else:
        lines[number] += rng.choice(("x", "9", " ", "(")) * 200_000
    return f"text: {kind}", "\n".join(lines).encode("utf-8", "surrogateescape")
