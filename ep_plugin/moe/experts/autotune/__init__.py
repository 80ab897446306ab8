"""`gemm = auto`: the grouped GEMM backend that is fastest for a layer's shape on this GPU.

Times are measured once per shape and kept in a file (see _times.py), so that later starts only read
them. All backends compute the same products, so ranks may choose differently and nothing is
communicated. Only the kernel is chosen here, never the precision. Backends with host syncs do not
take part. Other than for bf16 on CUDA nothing is measured, and the backend is `loop`.
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
from ep_plugin.moe.experts.hopper import ALIGNED, on_hopper
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.registry import available, resolve

MAX_ROWS = 32768  # most rows measured: with more the order stays the same, and memory runs out
# Their versions are in the key.
PACKAGES = ("triton", "transformer-engine", "deep-gemm", "sgl-deep-gemm")

logger = logging.getLogger(__name__)


def pick(weight: Tensor, num_rows: int) -> GroupedGemm:
    """Return the backend for `weight` [e, out, in] and calls with about `num_rows` rows.

    With 0 rows nothing is measured, and it is the backend of `rule`.
    """
    return settle(weight, num_rows) if num_rows else build(rule_for(weight), weight)


def rule(in_features: int, out_features: int, dtype: torch.dtype, cuda: bool) -> str:
    """Return the backend to take without measuring.

    For bf16 on CUDA with sizes that are multiples of 8 it is `triton` on Hopper and `torch_grouped`
    elsewhere, else `loop`.
    """
    aligned = in_features % ALIGNED == out_features % ALIGNED == 0
    if not (cuda and dtype == torch.bfloat16 and aligned):
        return "loop"
    return "triton" if on_hopper() else "torch_grouped"


def rule_for(weight: Tensor) -> str:
    """Return `rule` for `weight` [e, out, in]."""
    _, out_features, in_features = weight.shape
    return rule(in_features, out_features, weight.dtype, weight.is_cuda)


def settle(weight: Tensor, num_rows: int) -> GroupedGemm:
    """Return the fastest backend for `weight` [e, out, in], by times measured now or earlier."""
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
    """Return, as a text, everything that times depend on; it is their key in the file."""
    experts, out_features, in_features = weight.shape
    software = [f"torch {torch.__version__}", f"ep_plugin {__version__}"]
    for package in PACKAGES:
        try:
            software.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    shape = f"{experts} experts {in_features} -> {out_features}, {rows} random rows, {weight.dtype}"
    return f"{shape} on {torch.cuda.get_device_name(weight.device)}, {', '.join(software)}"


def candidates(weight: Tensor) -> dict[str, GroupedGemm]:
    """Return the installed backends that take the sizes and dtype of `weight` [e, out, in].

    Backends with host syncs are left out. Measured alone they may be as fast, but the host could
    not launch the rest of the layer ahead of the GPU.
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
    """Return the name of the fastest backend, or `default` if all fail.

    `time` returns a backend's time in milliseconds. If the file has times for `key`, they are used,
    and `backends`, which imports packages, is not called. Therefore a single backend is measured
    too. A backend that fails is left out with a warning. Then the file is not written, so that the
    next start tries the backend again.
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
        except Exception as error:  # from CUDA, out of memory, or a kernel that does not compile
            logger.warning("gemm auto: %s fails and is left out (%s)", name, error)
    return times
