"""Where a run took place: processor, cores, versions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from npmoe._cores import usable_cores
from npmoe._version import __version__

_PACKAGES = ("numpy", "numba", "ml_dtypes", "threadpoolctl", "torch", "transformers")
_DEVICE_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "numba-cuda", "triton", "vllm", "sglang")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """The device of a run on one, and how its limits and its memory were measured."""

    name: str
    limits: str
    memory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts that figures mean nothing without; package versions are None where missing.

    `device` is None for backends on host arrays.
    """

    processor: str
    cores: int
    usable_cores: int
    threads: int
    system: str
    python: str
    npmoe: str
    packages: dict[str, str | None]
    thread_pools: tuple[str, ...]
    device: DeviceFacts | None = None


def describe_machine(threads: int, device: DeviceFacts | None = None) -> Machine:
    """Collect the facts; call it inside `limit_threads` to see the pools as they are used."""
    from threadpoolctl import threadpool_info  # noqa: PLC0415  # extra cli

    pools = {
        f"{p['internal_api']} {p.get('version')}, {p['num_threads']} threads"
        for p in threadpool_info()
    }
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        threads=threads,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        npmoe=__version__,
        packages={
            name: _version(name) for name in _PACKAGES + (_DEVICE_PACKAGES if device else ())
        },
        thread_pools=tuple(sorted(pools)),
        device=device,
    )


def busy_elsewhere() -> float | None:
    """Return processor seconds that other processes have used since the start, or None if unknown.

    Only differences mean something; to one clock tick (10 ms) per core.
    """
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(v) for v in line.split()[1:9])
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return everybody - own.user - own.system


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
