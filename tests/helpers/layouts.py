"""The layouts at which training must equal one rank's, and what Megatron gets wrong without us."""

import functools
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from core_model import Case
from releases import NEWEST, RELEASES, ROOT, environment, in_full, shared_out

EVERYWHERE = (  # on every release that is tested in full
    Case("TP 2 with sequence parallelism, EP 4, ETP 1", 8, tp=2, ep=4),
    Case("EP 8 over TP 4 x DP 2 (folding), ETP 1", 8, tp=4, ep=8),
    Case("TP 2, EP 2, ETP 2, PP 2, distributed optimizer", 8, tp=2, pp=2, ep=2, etp=2,
         distributed_optimizer=True),
    Case("EP 1, ETP 2 over TP 1", 4, etp=2),
    Case("EP 1, ETP 1 under TP 2", 4, tp=2),
    Case("PP 2 x 2 virtual stages, EP 2, distributed optimizer", 4, pp=2, vpp=2, ep=2,
         distributed_optimizer=True),
    Case("dense-only first stage, PP 2, EP 2", 4, pp=2, ep=2, dense_layers=2),
    Case("per-token loss, TP 2, EP 2, ETP 1", 4, tp=2, ep=2, per_token=True),
    Case("full recompute, TP 2, EP 2, ETP 2", 4, tp=2, ep=2, etp=2, recompute="full"),
    Case("biases, shared expert, ranks without tokens: TP 2, EP 4, ETP 1", 4, tp=2, ep=4,
         bias=True),
    Case("CP 2, EP 2", 4, cp=2, ep=2),
    Case("EP 4 over DP 2 x CP 2 (folding), per-token loss, distributed optimizer", 4, cp=2, ep=4,
         per_token=True, distributed_optimizer=True),
    Case("TP 2, CP 2, PP 2, EP 4, ETP 1", 8, tp=2, cp=2, pp=2, ep=4),
)  # fmt: skip
MORE = (
    Case("EP 8", 8, sequences=8, ep=8),
    Case("EP 2, expert data parallelism 4, distributed optimizer", 8, sequences=8, ep=2,
         distributed_optimizer=True),
    Case("PP 4, EP 2, four micro-batches", 8, sequences=8, pp=4, ep=2),
    Case("TP 2, PP 2, EP 4, ETP 1, distributed optimizer", 8, tp=2, pp=2, ep=4,
         distributed_optimizer=True),
    Case("EP 2, ETP 2 over TP 1, distributed optimizer", 4, ep=2, etp=2,
         distributed_optimizer=True),
    Case("selective recompute, TP 2, EP 2, ETP 1", 4, tp=2, ep=2, recompute="selective"),
    Case("per-token loss, PP 2, EP 2, distributed optimizer", 4, pp=2, ep=2, per_token=True,
         distributed_optimizer=True),
    Case("MoE layers in the last of 2 x 2 virtual stages, EP 2", 4, pp=2, vpp=2, ep=2,
         dense_layers=3),
)  # fmt: skip
CASES = EVERYWHERE + MORE
# Left out of a test run on the newest: each pair of their settings is in another layout there.
IN_PAIRS = (
    "TP 2, PP 2, EP 4, ETP 1, distributed optimizer",
    "per-token loss, PP 2, EP 2, distributed optimizer",
)
NEWEST_ALONE = (
    Case("per-token loss under the combined schedule, PP 2 x 2 virtual stages, EP 2", 4,
         sequences=8, pp=2, vpp=2, ep=2, per_token=True, masked=0.8, combined=True),
    Case("padding masks, per-token loss, TP 2, CP 2, EP 4, ETP 1", 4, tp=2, cp=2, ep=4,
         per_token=True, padded=True),
    Case("padding masks, TP 2, PP 2, EP 2, ETP 1", 4, tp=2, pp=2, ep=2, per_token=True,
         padded=True),
)  # fmt: skip
# Layers of 2, 4, 8 and 6 experts: two, one and again two copies of each at EP 4.
DEGREES = (
    Case("a degree for each layer, EP 4", 4, ep=4, experts=(2, 4, 8, 6)),
    Case("a degree for each layer, EP 4 over DP 8, distributed optimizer, overlapped reduction", 8,
         sequences=8, ep=4, experts=(2, 4, 8, 6), distributed_optimizer=True, overlap=True),
    Case("a degree for each layer, TP 2, PP 2, EP 4, ETP 1, distributed optimizer, per token", 8,
         tp=2, pp=2, ep=4, experts=(2, 4, 8, 6), distributed_optimizer=True, per_token=True),
    Case("a degree for each layer, TP 2, EP 2, ETP 2", 4, tp=2, ep=2, etp=2,
         experts=(4, 8, 2, 3)),
)  # fmt: skip
DEGREES_OF_OLDER = {"0.16.1": DEGREES[:1], "0.17.1": DEGREES[3:], "0.18.2": DEGREES[1:2]}
WITH_HYBRID = ("0.18.2", "0.19.2")
# Against a GPT of the same weights on one rank; where a release has HybridModel.
HYBRID = (
    Case("hybrid *E*E, EP 4", 4, ep=4, layers=2, pattern="*E*E"),
    Case("hybrid *-*E, TP 2 with sequence parallelism, EP 2, ETP 1", 2, tp=2, ep=2, layers=2,
         dense_layers=1, pattern="*-*E"),
    Case("hybrid *E|*E, TP 2, PP 2, EP 2, ETP 2, distributed optimizer", 8, tp=2, pp=2, ep=2,
         etp=2, distributed_optimizer=True, layers=2, pattern="*E|*E"),
    Case("hybrid *-|*E|*E|*E, PP 2 x 2 virtual stages, EP 2, per token", 4, pp=2, vpp=2, ep=2,
         per_token=True, dense_layers=1, pattern="*-|*E|*E|*E"),
    Case("hybrid, a degree for each layer, full recompute, EP 4", 4, ep=4, recompute="full",
         layers=2, experts=(2, 8), pattern="*E*E"),
    Case("hybrid +E+E, latent attention, TP 2, EP 2, ETP 1", 2, tp=2, ep=2, latent="plain",
         layers=2, pattern="+E+E"),
    Case("hybrid, biases, shared expert, ranks without tokens: TP 2, EP 4, ETP 1", 4, tp=2, ep=4,
         bias=True, layers=2, pattern="*E*E"),
)  # fmt: skip
LATENT = (  # not in the support matrix: CPU mode sums what Megatron's local layers do not
    Case("latent attention, TP 2, EP 2, ETP 1", 2, tp=2, ep=2, latent="plain"),
    Case("latent attention of queries too, TP 2 without sequence parallelism", 2, tp=2, etp=2,
         latent="queries", sequence=False),
)  # fmt: skip
# On the other releases, where they differ: tags that tell experts apart, and the log of losses
# over the stages of a pipeline. Each of the others is run on one of them.
SEAMS = tuple(
    case
    for case in EVERYWHERE
    if case.name
    in (
        "TP 2 with sequence parallelism, EP 4, ETP 1",
        "PP 2 x 2 virtual stages, EP 2, distributed optimizer",
    )
)
CHECKS = (
    "doctor",
    "a symbol that is gone",
    "install and uninstall",
    "helpers of the wheel",
    "evaluation",
)
LOSS_CHECKS = (  # not in the support matrix
    "sharded parameters",
    "a pyramid with expert bias",
    "a repeated layer's balancing loss",
    "a repeated layer's z-loss",
    "loads of multi-token prediction",
    "several models",
    "padding",
    "padding and expert bias",
    "auxiliary losses' strength",
)
# Megatron until 0.18, as it is without us: each must differ from one rank.
BUGS = (
    Case("Megatron's own block: EP 1, ETP 1 under TP 2", 4, sequences=8, tp=2, layers=2,
         block="stock"),
    Case("untagged experts: TP 2, EP 4, ETP 1", 4, sequences=8, tp=2, ep=4, layers=2,
         block="untagged"),
)  # fmt: skip


def layouts_of(version: str) -> tuple[Case, ...]:
    """Return the layouts of a test run, with two layers where no stage needs more.

    `support_matrix.py` runs all on every release, with four.
    """
    older = tuple(
        case
        for case in EVERYWHERE
        if version in in_full() or case in SEAMS or version == shared_out(case.name, RELEASES[:-1])
    )
    newest = tuple(case for case in CASES if case.name not in IN_PAIRS) + NEWEST_ALONE
    cases = (newest if version == NEWEST else older) + LATENT
    degrees = DEGREES if version == NEWEST else DEGREES_OF_OLDER[version]
    hybrids = HYBRID if version == NEWEST else HYBRID[3:5] if version in WITH_HYBRID else ()
    return (
        degrees
        + hybrids
        + tuple(
            case if case.vpp or case.dense_layers or case.pp > 2 else replace(case, layers=2)
            for case in cases
        )
    )


@functools.cache
def results(version: str, layouts: tuple[Case, ...], iterations: int) -> dict[str, Any]:
    """Run layouts and the checks of a release, once, in one process; raises if that fails."""
    bugs = BUGS if version in RELEASES[:-1] else ()
    alone = {case.alone().name: case.alone() for case in (*layouts, *bugs)}
    cases = [asdict(case) for case in (*alone.values(), *layouts, *bugs)]
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder, "cases.json"), Path(folder, "results.json")
        wanted.write_text(
            json.dumps({"cases": cases, "iterations": iterations, "checks": CHECKS + LOSS_CHECKS})
        )
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "helpers" / "core_loop.py"), wanted, found],
            env=environment(version),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not found.exists():
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
        answer: dict[str, Any] = json.loads(found.read_text())
        return answer


def difference(found: dict[str, Any], case: Case) -> float:
    """Return the largest relative difference of any scalar of any iteration from one rank's."""
    worst = 0.0
    values, expected = found[case.name]["values"], found[case.alone().name]["values"]
    for ours, theirs in zip(values, expected, strict=True):
        for name, value in theirs.items():
            of_shards = name == "experts' gradients" or name.startswith("grad ")
            if of_shards and case.distributed_optimizer:
                continue  # ranks hold reduced shards alone
            worst = max(worst, abs(ours[name] - value) / max(abs(value), 1e-30))
    return worst
