"""What ranks must have alike: equal for equal arguments, other for each flag that differs."""

import json
import os
import subprocess
import sys
from copy import copy
from typing import Any

import pytest
from flag_values import CASES, PLAIN, given, parser

from ep_plugin.megatron.arguments.digest import OWN, PLACES, READ, TOGETHER, alike, digest
from ep_plugin.megatron.arguments.parser import with_preset

pytestmark = [pytest.mark.megatron, pytest.mark.newest]


def parse(*flags: str) -> Any:
    args = parser().parse_args(with_preset([*PLAIN, *flags]))
    args.rank, args.local_rank = 0, 0
    return args


def test_equal_arguments_have_one_digest() -> None:
    assert digest(parse("--ep-topk", "3")) == digest(parse("--ep-topk=3"))
    assert digest(parse("--ep-topk", "3")) == digest(parse("--moe-router-topk", "3"))


@pytest.mark.parametrize(("name", "value"), CASES)
def test_each_flag_of_ours_changes_it(name: str, value: Any) -> None:
    assert digest(parse(*given(name, value))) != digest(parse())


@pytest.mark.parametrize(
    "flags",
    ["--hidden-size 64", "--lr 1e-5", "--bf16", "--save here", "--seed 8", "--log-interval 2"],
)
def test_megatron_s_arguments_change_it(flags: str) -> None:
    assert digest(parse(*flags.split())) != digest(parse())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("--save here --load here", "--save there --load there"),
        ("--data-path a", "--data-path b"),
        ("--tensorboard-dir a", "--tensorboard-dir b"),
        ("--vocab-file a", "--vocab-file b"),
        ("--wandb-exp-name a", "--wandb-exp-name b"),
        ("--logging-level 10", "--logging-level 20"),
    ],
)
def test_places_and_logging_do_not(one: str, other: str) -> None:
    assert digest(parse(*one.split())) == digest(parse(*other.split()))


def test_who_a_rank_is_does_not() -> None:
    first, second = parse(), parse()
    second.rank, second.local_rank = 5, 1
    assert digest(first) == digest(second)


# Arguments of older releases, and of other scripts of Megatron's.
OLDER = {"app_tag_run_name", "app_tag_run_version", "tokenizer_metadata", "yaml_cfg"}


def test_what_may_differ_are_arguments_there_are_each_in_one_list_with_its_reason() -> None:
    lists = (OWN, PLACES, TOGETHER, READ)
    names = [name for one in lists for name in one]
    assert len(names) == len(set(names))
    assert set(names) - OLDER <= set(vars(parse()))
    assert all(reason for one in lists for reason in one.values())


def test_no_address_in_memory_is_in_it() -> None:
    args = copy(parse())
    args.function, args.thing = parse, object()
    found = alike(args)
    assert not [name for name, text in found.items() if " at 0x" in text]
    assert json.loads(json.dumps(found)) == found


def test_it_is_the_same_in_another_process() -> None:
    """Hashes of strings, and so the order of sets, differ from process to process."""
    code = (
        "from types import SimpleNamespace as N; from ep_plugin.megatron.arguments.digest import "
        "digest; print(digest(N(a={'x', 'y', 'z'}, b={'k': 1.5}, c=None)))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1
