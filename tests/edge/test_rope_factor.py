"""The factor of `--use-rope-scaling` reaches the model that Megatron's loop builds."""

import json
import os
import subprocess
import sys

import pytest
from flag_values import PLAIN
from loop import NEWEST, ROOT

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
if not NEWEST:
    pytest.skip("until Megatron 0.18 a script passes the factor itself", allow_module_level=True)
BUILT = """
import json, sys
import ep_plugin.megatron
from megatron.training import argument_utils, arguments

def factor():
    sys.argv = ["pretrain", *json.loads(sys.stdin.readline())]
    args = arguments.parse_args()
    arguments.validate_args(args)
    return argument_utils.gpt_config_from_args(args).rope_scaling_factor

ep_plugin.megatron.install()
found = [factor(), factor()]
ep_plugin.megatron.uninstall()
print(json.dumps(found))
"""


def test_the_factor_is_taken_along() -> None:
    flags = [*PLAIN, "--train-iters", "4", "--expert-model-parallel-size", "1"]
    lines = [[*flags, "--use-rope-scaling", "--rope-scaling-factor", "32"], flags]
    done = subprocess.run(
        [sys.executable, "-c", BUILT],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        env={**os.environ, "EP_PLUGIN_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [32, 8]  # 8: without scaling, and unread
