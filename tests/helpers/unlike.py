"""The loop's script with something of its own on one rank: UNLIKE says what, UNLIKE_RANK where.

UNLIKE is a list in JSON: words that are put behind the command line, or one of `sleep`, `raise`,
`group first`.
"""

import json
import os
import runpy
import sys
import time

import torch.distributed as dist

if __name__ == "__main__":
    words = json.loads(os.environ["UNLIKE"])
    here = os.environ["RANK"] == os.environ.get("UNLIKE_RANK", "1")
    if words[0] == "group first":  # as workers of Ray have it, and with another setting on one rank
        dist.init_process_group("gloo")
        words = words[1:]
    if here and words[0] == "sleep":
        time.sleep(60)
    elif here and words[0] == "raise":
        from megatron.training import global_vars

        def set_global_variables(args: object, *rest: object, **more: object) -> None:
            raise FileNotFoundError("no tokenizer on this host")

        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "")
            if name.startswith("megatron.training") and hasattr(module, "set_global_variables"):
                module.set_global_variables = set_global_variables
        global_vars.set_global_variables = set_global_variables
    elif here:
        sys.argv += words
    runpy.run_path(os.environ["UNLIKE_SCRIPT"], run_name="__main__")
