"""`ep-plugin apply`: pairs in golden/apply, encodings and line endings, refusals, patches."""

import encodings.aliases
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ep_plugin.cli import main
from ep_plugin.commands.apply import apply, diff, revert, rewrite
from ep_plugin.errors import ConfigError

PATCHES = Path(__file__).parents[2] / "patches"
PAIRS = {
    path.name.removesuffix(".before.txt"): (
        path.read_text(),
        path.with_name(path.name.replace(".before.", ".after.")).read_text(),
    )
    for path in sorted((Path(__file__).parents[1] / "golden" / "apply").glob("*.before.txt"))
}
CODECS = sorted({*encodings.aliases.aliases.values(), "idna", "punycode", "undefined", "zz" * 99})
LATIN = "# -*- coding: latin-1 -*-\n# caf\u00e9\n"
VARIATIONS: dict[str, Callable[[str], bytes]] = {
    "lf": lambda text: text.encode(),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "cr": lambda text: text.replace("\n", "\r").encode(),
    "no final newline": lambda text: text.removesuffix("\n").encode(),
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "encoding cookie": lambda text: (LATIN + text).encode("latin-1"),
}
SCRIPT = PAIRS["usual"][0]
IMPORTS = "from megatron.training import pretrain\n"
GUARD = 'if __name__ == "__main__":\n'


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("pair", PAIRS)
def test_pair_in_every_variation(pair: str, variation: str) -> None:
    before, after = map(VARIATIONS[variation], PAIRS[pair])
    assert rewrite(before, apply) == after
    assert rewrite(after, apply) == after
    assert rewrite(after, revert) == before
    assert rewrite(before, revert) == before


@pytest.mark.parametrize("codec", CODECS)
def test_a_script_in_any_codec_is_edited_or_refused(codec: str) -> None:
    source = f"# -*- coding: {codec} -*-\n{SCRIPT}{'# long ' * 100}\n".encode()
    try:
        applied = rewrite(source, apply)
    except ConfigError as error:
        refused = str(error)
    else:
        refused = ""
        assert rewrite(applied, revert) == source
    assert "\n" not in refused


@pytest.mark.parametrize("header_ending", ["\n", "\r\n"])
@pytest.mark.parametrize("pair", PAIRS)
def test_mixed_endings_stay_and_new_lines_end_as_the_guard(pair: str, header_ending: str) -> None:
    before, after = PAIRS[pair]
    other = {"\n": "\r\n", "\r\n": "\n"}[header_ending]
    inserted_at = next(n for n, line in enumerate(after.split("\n")) if "import ep_plugin" in line)
    lines = before.split("\n")
    endings = [header_ending if (n - inserted_at) % 2 else other for n in range(len(lines) - 1)]
    mixed = "".join(map("".join, zip(lines, [*endings, ""], strict=True)))
    applied = apply(mixed)
    assert applied.replace("\r\n", "\n") == after
    new = applied.splitlines(keepends=True)[inserted_at - 1 : inserted_at + 3]
    assert {line[len(line.rstrip("\r\n")) :] for line in new} == {header_ending}
    assert revert(applied) == mixed


@pytest.mark.parametrize("pair", PAIRS)
def test_a_byte_order_mark_left_in_the_text_stays(pair: str) -> None:
    before, after = ("\ufeff" + text for text in PAIRS[pair])
    assert apply(before) == after
    assert revert(after) == before


def test_a_formatters_blank_line_is_understood() -> None:
    formatted = apply(SCRIPT).replace("ep_plugin.megatron\n", "ep_plugin.megatron\n\n", 1)
    assert apply(formatted) == formatted
    assert revert(formatted) == SCRIPT


@pytest.mark.parametrize(
    "text", ["", "x = 1\n", GUARD + "    main()\n", "import ep_plugin\nep_plugin.MoELayer\n"]
)
def test_revert_leaves_a_script_without_the_plugin_alone(text: str) -> None:
    assert revert(text) == text


REFUSED = {
    "no call": (GUARD + "    train()\n", r"no `pretrain\(` call"),
    "no script": ("", "there is no `if __name__"),
    "mentioned only": (IMPORTS + GUARD + "    run(pretrain)\n", r"no `pretrain\(` call"),
    "its own function": (
        "def pretrain(): ...\n" + GUARD + "    pretrain()\n",
        r"no `pretrain\(` call",
    ),
    "some method": (
        "import other\ntrainer = other.Trainer()\n" + GUARD + "    trainer.pretrain()\n",
        r"no `pretrain\(` call",
    ),
    "no guard": (IMPORTS + "def main():\n    pretrain()\n", "there is no `if __name__"),
    "no pretrain guard": (
        IMPORTS + "if __name__ != '__main__':\n    pretrain()\n",
        "there is no `if __name__",
    ),
    "one line": (IMPORTS + 'if __name__ == "__main__": pretrain()\n', "line 2: .* share a line"),
    "one line, continued": (
        IMPORTS + 'if __name__ == "__main__": \\\n    pretrain()\n',
        "line 2: .* share a line",
    ),
    "one line, in brackets": (
        IMPORTS + 'if (__name__ == "__main__"\n    ): pretrain()\n',
        "line 2: .* share a line",
    ),
    "two guards": (
        IMPORTS + GUARD + "    setup()\n" + GUARD + "    pretrain()\n",
        "line 4: a second .* line 2",
    ),
    "further condition": (
        IMPORTS + 'if __name__ == "__main__" and True:\n    pretrain()\n',
        "line 2: .* no further condition",
    ),
    "nested guard": (
        IMPORTS + "try:\n    " + GUARD + "        pretrain()\nfinally:\n    pass\n",
        "line 3: .* at the top level",
    ),
    "syntax": (IMPORTS + GUARD + "    pretrain(\n", r"line 3: '\(' was never closed"),
    "null byte": (IMPORTS + GUARD + "    pretrain()\0\n", "null bytes"),
    "call before the guard": (
        IMPORTS + "pretrain()\n" + GUARD + "    pass\n",
        r"line 2: pretrain\( is called outside .*\(line 3\)",
    ),
    "call in an else": (
        IMPORTS + GUARD + "    pass\nelse:\n    pretrain()\n",
        r"line 5: pretrain\( is called outside",
    ),
    "call in a class body": (
        IMPORTS + "class A:\n    x = pretrain()\n" + GUARD + "    pass\n",
        r"line 3: pretrain\( is called outside",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        apply(text)


APPLIED = apply(IMPORTS + GUARD + "    pretrain()\n")
EDITED = {
    "call gone": APPLIED.replace("    ep_plugin.megatron.install()\n", ""),
    "import gone": APPLIED.replace("    import ep_plugin.megatron\n", ""),
    "blank line gone": APPLIED.replace("install()\n\n", "install()\n"),
    "argument added": APPLIED.replace("install()", "install(True)"),
    "comment added": APPLIED.replace("install()", "install()  # ours"),
    "moved": APPLIED.replace(GUARD, GUARD + "    # first\n"),
    "call commented": APPLIED.replace("ep_plugin.megatron.i", "# ep_plugin.megatron.i"),
    "twice": APPLIED.replace(GUARD, GUARD + "".join(APPLIED.splitlines(True)[2:5])),
    "by hand": "from ep_plugin.megatron import install\ninstall()\n" + SCRIPT,
    "from the package": "from ep_plugin import megatron\n" + SCRIPT,
}


@pytest.mark.parametrize("edit", [apply, revert])
@pytest.mark.parametrize("case", EDITED)
def test_a_half_edited_call_is_refused_with_its_line(case: str, edit: Callable[[str], str]) -> None:
    assert EDITED[case] != APPLIED
    with pytest.raises(ConfigError, match=r"line \d+: uses ep_plugin\.megatron, but not as"):
        edit(EDITED[case])


def test_the_line_of_a_stray_use_is_named() -> None:
    text = APPLIED.replace(IMPORTS, IMPORTS + "import ep_plugin.megatron.seams.install\n")
    with pytest.raises(ConfigError, match=r"^line 2: "):
        apply(text)


def test_revert_keeps_the_guard_from_becoming_empty() -> None:
    with pytest.raises(ConfigError, match="line 2: nothing else is under the guard"):
        revert(APPLIED.replace("    pretrain()\n", ""))


@pytest.mark.parametrize("source", [b"# coding: nonsense\n", b"caf\xe9 = 1\n"])
def test_bytes_that_are_no_source_are_refused(source: bytes) -> None:
    with pytest.raises(ConfigError, match="not Python source"):
        rewrite(source, apply)


# the command


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("pretrain_it.py")
    path.write_text(SCRIPT)
    return path


def test_command_applies_checks_and_reverts(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.chmod(0o751)
    for arguments, code, said, text in (
        (["--check"], 1, "plugin would be added", SCRIPT),
        ([], 0, "plugin added", apply(SCRIPT)),
        ([], 0, "unchanged", apply(SCRIPT)),
        (["--check"], 0, "unchanged", apply(SCRIPT)),
        (["--check", "--revert"], 1, "plugin would be taken out", apply(SCRIPT)),
        (["--revert"], 0, "plugin taken out", SCRIPT),
        (["--revert"], 0, "unchanged", SCRIPT),
    ):
        assert main(["apply", *arguments, str(script)]) == code
        assert capsys.readouterr().out == f"{script}: {said}\n"
        assert script.read_text() == text
    assert stat.S_IMODE(script.stat().st_mode) == 0o751
    assert list(Path().iterdir()) == [script]


def test_command_writes_through_a_symbolic_link(script: Path) -> None:
    link = Path("link.py")
    link.symlink_to(script)
    assert main(["apply", str(link)]) == 0
    assert link.is_symlink()
    assert script.read_text() == apply(SCRIPT)


def test_command_writes_nothing_when_one_script_is_refused(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.py").write_text("x = 1\n")
    assert main(["apply", str(script), "bad.py"]) == 2
    assert capsys.readouterr().err.startswith("ep-plugin apply: error: bad.py: there is no")
    assert script.read_text() == SCRIPT


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_command_names_a_file_it_cannot_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", name]) == 2
    assert re.fullmatch(
        rf"ep-plugin apply: error: {re.escape(name)} cannot be read \(.+\); give .+\n",
        capsys.readouterr().err,
    )


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git_apply(folder: Path, patch: bytes, *flags: str) -> None:
    command = ["git", "apply", *flags, "-"]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(command, cwd=folder, input=patch, check=True, env=environment)


@needs_git
@pytest.mark.parametrize("check", [[], ["--check"]])
@pytest.mark.parametrize("variation", [v for v in VARIATIONS if v != "cr"])
def test_diff_is_a_patch_and_writes_nothing(
    variation: str, check: list[str], script: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    before = VARIATIONS[variation](IMPORTS + GUARD + "    pretrain()\n")
    script.write_bytes(before)
    assert main(["apply", "--diff", *check, str(script)]) == len(check)
    patch = capfdbinary.readouterr().out
    assert script.read_bytes() == before
    git_apply(Path.cwd(), patch)
    assert script.read_bytes() == rewrite(before, apply)
    assert main(["apply", "--diff", str(script)]) == 0
    assert capfdbinary.readouterr().out == b""


# patches/


def releases() -> list[str]:
    return sorted(path.name for path in PATCHES.iterdir() if path.is_dir())


def reconstructed(patch: str) -> str:
    """Return a script with the patch's context, its guard in the line that the patch says."""
    first = re.search(r"^@@ -(\d+),2 ", patch, re.MULTILINE)
    assert first is not None
    guard, comment = re.findall(r"^ (.*\n)", patch, re.MULTILINE)
    filler = "#\n" * (int(first.group(1)) - 2)
    return f"{IMPORTS}{filler}{guard}{comment}    pretrain()\n"


@pytest.mark.parametrize("release", releases())
def test_patch_is_what_apply_does(release: str) -> None:
    patch = (PATCHES / release / "pretrain_gpt.patch").read_text()
    before = reconstructed(patch)
    after = apply(before)
    assert diff("pretrain_gpt.py", before.encode(), after.encode()).decode() == patch


@needs_git
@pytest.mark.parametrize("release", releases())
def test_patch_applies_and_can_be_dropped(release: str, tmp_path: Path) -> None:
    patch = (PATCHES / release / "pretrain_gpt.patch").read_bytes()
    before = reconstructed(patch.decode())
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(before)
    git_apply(tmp_path, patch)
    assert script.read_text() == apply(before)
    git_apply(tmp_path, patch, "-R")
    assert script.read_text() == before


def test_patch_equals_one_made_from_a_checkout() -> None:
    checkout = os.environ.get("EP_MEGATRON_LM")
    if checkout is None:
        pytest.skip("EP_MEGATRON_LM names no Megatron-LM checkout to make the patch from")
    about = (Path(checkout) / "megatron" / "core" / "package_info.py").read_text()
    major, minor = (re.findall(rf"^{part} = (\d+)", about, re.M)[0] for part in ("MAJOR", "MINOR"))
    release = f"core_{major}_{minor}"
    if release not in releases():
        pytest.skip(f"EP_MEGATRON_LM is {release}; there are patches for {', '.join(releases())}")
    source = (Path(checkout) / "pretrain_gpt.py").read_bytes()
    made = diff("pretrain_gpt.py", source, rewrite(source, apply))
    assert made == (PATCHES / release / "pretrain_gpt.patch").read_bytes()
    assert rewrite(rewrite(source, apply), revert) == source


def test_every_supported_release_has_its_patches() -> None:
    tables = PATCHES.parent / "ep_plugin" / "megatron" / "versions"
    known = sorted(path.stem for path in tables.glob("core_*.py"))
    experimental = {
        "core_0_20"
    }  # Megatron's main, which moves: `apply` makes one where it is asked
    assert releases() == [name for name in known if name not in experimental]
    for release in releases():
        assert f"`{release}/pretrain_gpt.patch`" in (PATCHES / "README.md").read_text()
