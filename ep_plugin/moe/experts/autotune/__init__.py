"""`gemm = auto`: the grouped GEMM backend that is fastest for a layer's shape on this GPU.

Measured once for a shape, then kept in a file (see _times.py), so that later starts only read it.
All backends compute the same products, so ranks may choose differently and nothing is communicated.
Only a kernel is chosen here, never a recipe, and none that waits for the host. But for bf16 on CUDA
nothing is measured: `loop`.
"""

import logging
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter

import torch
from torch import Tensor

from ep_plugin import __version__
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.moe.experts.autotune import _times
from ep_plugin.moe.experts.autotune._clock import time_on_gpu
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.registry import available, resolve

MAX_ROWS = 32768  # measured at most: beyond it the order no longer changes, and memory is short
PACKAGES = ("transformer-engine", "deep-gemm", "sgl-deep-gemm")  # of backends, beside torch

logger = logging.getLogger(__name__)


def pick(weight: Tensor, num_rows: int) -> GroupedGemm:
    """Return the backend for `weight` [e, out, in] and calls with about `num_rows` rows.

    With 0 rows it is the rule's, which never waits for the GPU: nothing can be measured for them.
    """
    return settle(weight, num_rows) if num_rows else build(rule_for(weight), weight)


def rule(in_features: int, out_features: int, dtype: torch.dtype, cuda: bool) -> str:
    """Return what to take unmeasured: `torch_grouped` for bf16 on CUDA, else `loop`."""
    aligned = in_features % 8 == out_features % 8 == 0
    return "torch_grouped" if cuda and dtype == torch.bfloat16 and aligned else "loop"


def rule_for(weight: Tensor) -> str:
    """Return `rule` for `weight` [e, out, in]."""
    _, out_features, in_features = weight.shape
    return rule(in_features, out_features, weight.dtype, weight.is_cuda)


def settle(weight: Tensor, num_rows: int) -> GroupedGemm:
    """Return the fastest backend for `weight` [e, out, in], measured or from an earlier run."""
    name = rule_for(weight)
    if name != "loop":
        rows = min(1 << (num_rows - 1).bit_length(), MAX_ROWS)
        name = choose(
            describe(weight, rows),
            lambda: candidates(weight),
            lambda gemm: time_on_gpu(gemm, weight.detach(), rows),
            name,
        )
    return build(name, weight)


def describe(weight: Tensor, rows: int) -> str:
    """Return all that the times depend on: it is their key in the file."""
    experts, out_features, in_features = weight.shape
    software = [f"torch {torch.__version__}", f"ep_plugin {__version__}"]
    for package in PACKAGES:
        try:
            software.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    shape = f"{experts} experts {in_features} -> {out_features}, {rows} rows, {weight.dtype}"
    return f"{shape} on {torch.cuda.get_device_name(weight.device)}, {', '.join(software)}"


def candidates(weight: Tensor) -> dict[str, GroupedGemm]:
    """Return the backends that are installed and take the sizes and dtype of `weight`.

    None that waits for the host: alone it may be as fast, but it keeps the layer around it from
    being launched ahead of the GPU.
    """
    found = {}
    for name in available("gemm"):
        try:
            backend = build(name, weight)
        except (BackendUnavailable, ConfigError):
            continue
        if not backend.waits_for_host:
            found[name] = backend
    return found


def build(name: str, weight: Tensor) -> GroupedGemm:
    """Return the backend `name` for `weight` [e, out, in]; raises what its `build` raises."""
    _, out_features, in_features = weight.shape
    backend: GroupedGemm = resolve("gemm", name)(in_features, out_features, weight.dtype)
    return backend


def choose(
    key: str,
    backends: Callable[[], Mapping[str, GroupedGemm]],
    time: Callable[[GroupedGemm], float],
    default: str,
) -> str:
    """Return the name of the fastest backend; `time` gives milliseconds.

    Times in the file are taken as they are, and then `backends`, which imports their packages, is
    not called: for that reason one that is alone is measured too. A backend that fails is left out
    with a warning, and then the file is not written, so that the next start tries it again;
    `default` where all fail.
    """
    path, start = _times.path(), perf_counter()
    times, source = _times.read(path).get(key), str(path)
    if not times:
        found = backends()
        times = _measure(found, time)
        source = f"measured in {perf_counter() - start:.1f} s"
        if len(times) == len(found):
            _times.write(path, key, times)
    name = min(times, key=times.__getitem__, default=default)
    shown = ", ".join(f"{other} {milliseconds:.3f} ms" for other, milliseconds in times.items())
    logger.info("gemm auto: %s for %s (%s; %s)", name, key, shown, source)
    return name


def _measure(
    found: Mapping[str, GroupedGemm], time: Callable[[GroupedGemm], float]
) -> _times.Times:
    times = {}
    for name, gemm in found.items():
        try:
            times[name] = time(gemm)
        except RuntimeError as error:  # of CUDA, or no memory left
            logger.warning("gemm auto: %s fails and is left out (%s)", name, error)
    return times
