"""The registry, and the contract of a backend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import npmoe
from accel import loopback
from npmoe import BackendUnavailableError, MoEConfig, RangeError
from npmoe.backends import (
    Availability,
    Backend,
    FusedExperts,
    ReferenceBackend,
    registry,
)

ROOT = Path(npmoe.__file__).resolve().parents[1]
FIRST_PARTY = ["cupy", "loopback", "numba", "numba_cuda", "numpy", "reference"]
NUMBA_MISSING = importlib.util.find_spec("numba") is None
# Whether there is a device can only be asked.
NO_DEVICE = not npmoe.available_backends()["cupy"].ok
UNUSABLE = {
    "numba": (NUMBA_MISSING, "needs the extra npmoe[numba]: numba"),
    "cupy": (NO_DEVICE, "needs a CUDA device and npmoe[cuda13]: cupy"),
    "numba_cuda": (NO_DEVICE, "needs a CUDA device and npmoe[cuda13]: numba-cuda"),
}
USABLE = [name for name in FIRST_PARTY if not UNUSABLE.get(name, (False,))[0]]
usable = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(name not in USABLE, reason=UNUSABLE.get(name, ("", ""))[1]),
        )
        for name in FIRST_PARTY
    ],
)
MEMBERS = [n for n, v in vars(Backend).items() if inspect.isfunction(v) and n[0] != "_"]
VERBS = [n for n in MEMBERS if n not in ("asarray", "asnumpy", "synchronize")]
FUSED = ["experts_forward", "experts_backward"]


class Broken(ReferenceBackend):
    name: ClassVar[str] = "broken"

    @classmethod
    def availability(cls) -> Availability:
        return Availability(False, "no device; install npmoe[broken]")


class Third(ReferenceBackend):
    name: ClassVar[str] = "third"

    def __init__(self, size: int = 1) -> None:
        self.size = size


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_instances", {})
    monkeypatch.delenv("NPMOE_BACKEND", raising=False)


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[importlib.metadata.EntryPoint]:
    """Return the list of installed entry points, to be filled."""
    installed: list[importlib.metadata.EntryPoint] = []

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [p for p in installed if p.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return installed


def point(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, "npmoe.backends")


def message(error: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        npmoe.get_backend(*arguments, **options)
    return str(caught.value)


# The registry.


@pytest.mark.parametrize(
    ("typo", "meant"), [("nunpy", "numpy"), ("loopbak", "loopback"), ("numbda", "numba")]
)
def test_unknown_name(typo: str, meant: str, points: list[Any]) -> None:
    assert message(RangeError, typo) == (
        f"get_backend: backend must name a known backend, got {typo!r}. Did you mean {meant!r}? "
        "Known: cupy, loopback, numba, numba_cuda, numpy, reference."
    )


def test_unknown_name_without_a_guess(points: list[Any]) -> None:
    assert message(RangeError, "zzz") == (
        "get_backend: backend must name a known backend, got 'zzz'. "
        "Known: cupy, loopback, numba, numba_cuda, numpy, reference."
    )


def test_names_give_one_instance_each() -> None:
    assert npmoe.get_backend().name == "numpy"
    for name in USABLE:
        backend = npmoe.get_backend(name)
        assert backend.name == name
        assert npmoe.get_backend(name) is backend
        assert npmoe.get_backend(backend) is backend


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPMOE_BACKEND", "reference")
    assert npmoe.get_backend().name == "reference"
    assert npmoe.get_backend("numpy").name == "numpy"
    with npmoe.use_backend("loopback"):
        assert npmoe.get_backend().name == "loopback"
    monkeypatch.setenv("NPMOE_BACKEND", "")
    assert npmoe.get_backend().name == "numpy"
    monkeypatch.setenv("NPMOE_BACKEND", "nunpy")
    assert "got 'nunpy'. Did you mean 'numpy'?" in message(RangeError)


def test_use_backend_nests_and_restores() -> None:
    with npmoe.use_backend("reference") as outer:
        assert npmoe.get_backend() is outer
        with npmoe.use_backend("loopback") as inner:
            assert npmoe.get_backend() is inner
        with pytest.raises(ZeroDivisionError), npmoe.use_backend("loopback"):
            raise ZeroDivisionError
        assert npmoe.get_backend() is outer
        with pytest.raises(RangeError), npmoe.use_backend("nunpy"):
            pass
        assert npmoe.get_backend() is outer
    assert npmoe.get_backend().name == "numpy"


def test_use_backend_stays_in_its_thread() -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append(npmoe.get_backend().name)
        with npmoe.use_backend("loopback"):
            seen.append(npmoe.get_backend().name)

    with npmoe.use_backend("reference"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert npmoe.get_backend().name == "reference"
    assert seen == ["numpy", "loopback"]


def test_the_layer_uses_the_context() -> None:
    cfg = MoEConfig(hidden_size=4)
    x, params = np.ones((2, 4), np.float32), npmoe.init_params(cfg)
    with npmoe.use_backend("reference") as backend:
        _, saved = npmoe.moe_forward(x, params, cfg)
    assert saved is not None
    assert saved.backend is backend
    _, saved = npmoe.moe_forward(x, params, cfg)
    assert saved is not None
    assert saved.backend.name == "numpy"


def test_options_make_a_new_instance(points: list[Any]) -> None:
    points.append(point("third", f"{__name__}:Third"))
    plain = npmoe.get_backend("third")
    assert isinstance(plain, Third)
    large = npmoe.get_backend("third", size=3)
    assert isinstance(large, Third)
    assert (plain.size, large.size) == (1, 3)
    assert npmoe.get_backend("third") is plain
    with npmoe.use_backend("third", size=5) as used:
        assert isinstance(used, Third)
        assert used.size == 5
    assert message(RangeError, plain, size=2, zone="a") == (
        "get_backend: options must be empty with an instance, got ['size', 'zone']. "
        "Give them to its constructor."
    )


def test_third_party_is_listed_and_runs(points: list[Any]) -> None:
    points += [point("third", f"{__name__}:Third"), point("third", f"{__name__}:Third")]
    points.append(importlib.metadata.EntryPoint("other", "nowhere:X", "another.group"))
    assert list(npmoe.available_backends()) == [*FIRST_PARTY, "third"]
    cfg = MoEConfig(hidden_size=4)
    _, saved = npmoe.moe_forward(
        np.ones((2, 4), np.float32), npmoe.init_params(cfg), cfg, backend="third"
    )
    assert saved is not None
    assert type(saved.backend) is Third


@pytest.mark.parametrize("names", [("numpy", "numpy"), ("twin", "twin")])
def test_duplicate_names(names: tuple[str, str], points: list[Any]) -> None:
    points += [point(names[0], "first:A"), point(names[1], "second:B")]
    first = "npmoe.backends.numpy_backend:NumpyBackend" if names[0] == "numpy" else "first:A"
    second = "first:A" if names[0] == "numpy" else "second:B"
    for name in ("reference", "numpy"):
        assert message(RangeError, name) == (
            f"get_backend: backend names must be unique, got {names[0]!r} from {first} and "
            f"{second}. Uninstall one of the packages."
        )


def test_unavailable(points: list[Any]) -> None:
    points += [point("broken", f"{__name__}:Broken"), point("gone", "no_such_package:X")]
    assert message(BackendUnavailableError, "broken") == (
        "get_backend: backend 'broken' cannot run here: no device; install npmoe[broken]. "
        f"Usable now: {', '.join(USABLE)}."
    )
    found = npmoe.available_backends()
    assert found["broken"] == Availability(False, "no device; install npmoe[broken]")
    assert found["gone"] == Availability(False, "No module named 'no_such_package'")
    assert all(found[name] == Availability(True) for name in USABLE)
    with pytest.raises(BackendUnavailableError), npmoe.use_backend("broken"):
        pass
    assert npmoe.get_backend().name == "numpy"


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "NPMOE_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=path[0] if path else ROOT,
    )


LOAD = (
    "import npmoe\n"
    "try:\n    print(npmoe.get_backend('loopback').name)\n"
    "except npmoe.BackendUnavailableError as error:\n    print(error)\n"
    "print(npmoe.available_backends()['loopback'].ok, npmoe.get_backend('numpy').name)"
)


@pytest.mark.parametrize("kind", ["package", "module", "same marker"])
def test_decoy_package(kind: str, tmp_path: Path) -> None:
    marker = None
    decoy = tmp_path / "accel" / "__init__.py"
    if kind == "module":
        decoy = tmp_path / "accel.py"
    decoy.parent.mkdir(exist_ok=True)
    if kind == "same marker":
        marker = npmoe.__version__
    where = str(decoy)
    decoy.write_text(f"NPMOE_ACCEL_VERSION = {marker!r}\n" if marker else "")
    result = python(LOAD, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"get_backend: package 'accel' must be the one shipped with npmoe {npmoe.__version__}, "
        f"got {where} (marker {marker}). Another package of that name comes first on sys.path; "
        "rename or remove it.",
        "False numpy",
    ]


def test_without_a_decoy() -> None:
    result = python(LOAD)
    assert result.stdout.splitlines() == ["loopback", "True numpy"], result.stderr


def test_marker_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import accel

    marker = accel.NPMOE_ACCEL_VERSION
    assert npmoe.__version__ == marker
    monkeypatch.setattr(accel, "NPMOE_ACCEL_VERSION", "0.0.1")
    assert "(marker 0.0.1)" in message(BackendUnavailableError, "loopback")


# A backend whose package is missing or too old: as on a machine without the extra.

MISSING = """
import importlib.metadata, sys
real = importlib.metadata.version
def version(name):
    if name == "numba":
        {version}
    return real(name)
importlib.metadata.version = version
{hide}
import numpy as np
import npmoe
for call in (npmoe.get_backend, lambda name: npmoe.use_backend(name).__enter__()):
    try:
        call("numba")
    except npmoe.BackendUnavailableError as error:
        print(error)
print(npmoe.available_backends()["numba"])
print([n for n, a in npmoe.available_backends().items() if a.ok])
cfg = npmoe.MoEConfig(hidden_size=4)
npmoe.moe_forward(np.ones((2, 4), "float32"), npmoe.init_params(cfg), cfg)
print(sorted(n for n in ("numba", "llvmlite") if sys.modules.get(n)))
"""
HIDE = "sys.modules['numba'] = None"
OLD = "numba {} is older than 0.60; pip install --upgrade 'npmoe[numba]'"


@pytest.mark.parametrize(
    ("version", "hide", "reason"),
    [
        (
            "raise importlib.metadata.PackageNotFoundError(name)",
            HIDE,
            "numba is not installed; pip install 'npmoe[numba]'",
        ),
        ("return '0.59.1'", "", OLD.format("0.59.1")),
        ("return '0.9'", "", OLD.format("0.9")),
        ("return '0.59.0rc1'", "", OLD.format("0.59.0rc1")),
        ("return '0.61.2'", HIDE, "import of numba halted; None in sys.modules"),
    ],
    ids=["missing", "old", "older", "old candidate", "broken"],
)
def test_without_numba(version: str, hide: str, reason: str) -> None:
    result = python(MISSING.format(version=version, hide=hide))
    assert result.returncode == 0, result.stderr
    text = (
        f"get_backend: backend 'numba' cannot run here: {reason}. "
        "Usable now: loopback, numpy, reference."
    )
    assert result.stdout.splitlines() == [
        text,
        text,
        str(Availability(False, reason)),
        "['loopback', 'numpy', 'reference']",
        "[]",
    ]


@pytest.mark.parametrize("version", ["0.60.0", "0.61.0rc1", "0.68.1", "1.0b2", "0.62dev0"])
def test_a_new_enough_numba(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel.numba_cpu.requirements import require_numba

    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    require_numba()


# The contract.


def test_protocol_has_the_verbs_that_loopback_wraps() -> None:
    assert len(VERBS) == 38
    assert sorted(loopback.VERBS) == sorted(VERBS)


@usable
def test_every_backend_is_complete(name: str) -> None:
    backend = npmoe.get_backend(name)
    assert isinstance(backend, Backend)
    assert backend.availability() == Availability(True)
    assert backend.synchronize() is None
    assert isinstance(backend.host_arrays, bool)
    for member in MEMBERS:
        declared = inspect.signature(getattr(Backend, member))
        found = inspect.signature(getattr(backend, member))
        wanted = [(p.name, p.kind, p.default) for p in declared.parameters.values()][1:]
        assert [(p.name, p.kind, p.default) for p in found.parameters.values()] == wanted, member


@usable
def test_accelerates_lists_real_overrides(name: str) -> None:
    backend = npmoe.get_backend(name)
    cls = type(backend)
    faster = name in ("numpy", "numba")
    assert cls.accelerates <= {*VERBS, *FUSED}
    own = {n for n in (*VERBS, *FUSED) if n in vars(cls)} if faster else set()
    assert cls.accelerates == own
    assert isinstance(backend, FusedExperts) == faster


def test_transfer_of_host_backends() -> None:
    x = np.arange(3.0)
    for name in ("numpy", "reference"):
        backend = npmoe.get_backend(name)
        assert backend.host_arrays
        assert backend.asarray(x) is x
        assert backend.asnumpy(x) is x
        assert type(backend.asarray([1.0])) is np.ndarray
