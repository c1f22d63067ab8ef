"""The registry, the contract of a backend, and the loopback device."""

from __future__ import annotations

import importlib.metadata
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
from npmoe import BackendUnavailableError, DTypeError, MoEConfig, RangeError
from npmoe.backends import (
    Availability,
    Backend,
    FusedExperts,
    NumpyBackend,
    ReferenceBackend,
    registry,
)
from npmoe.dispatch import plan_dispatch
from npmoe.tree import map_arrays

ROOT = Path(npmoe.__file__).resolve().parents[1]
FIRST_PARTY = ["loopback", "numpy", "reference"]
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


@pytest.mark.parametrize(("typo", "meant"), [("nunpy", "numpy"), ("loopbak", "loopback")])
def test_unknown_name(typo: str, meant: str, points: list[Any]) -> None:
    assert message(RangeError, typo) == (
        f"get_backend: backend must name a known backend, got {typo!r}. Did you mean {meant!r}? "
        "Known: loopback, numpy, reference."
    )


def test_unknown_name_without_a_guess(points: list[Any]) -> None:
    assert message(RangeError, "zzz") == (
        "get_backend: backend must name a known backend, got 'zzz'. "
        "Known: loopback, numpy, reference."
    )


def test_names_give_one_instance_each() -> None:
    assert npmoe.get_backend().name == "numpy"
    for name in FIRST_PARTY:
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
    assert list(npmoe.available_backends()) == ["loopback", "numpy", "reference", "third"]
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
        "Usable now: loopback, numpy, reference."
    )
    found = npmoe.available_backends()
    assert found["broken"] == Availability(False, "no device; install npmoe[broken]")
    assert found["gone"] == Availability(False, "No module named 'no_such_package'")
    assert all(found[name] == Availability(True) for name in FIRST_PARTY)
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


# The contract.


def test_protocol_has_the_verbs_that_loopback_wraps() -> None:
    assert len(VERBS) == 19
    assert sorted(loopback.VERBS) == sorted(VERBS)


@pytest.mark.parametrize("name", FIRST_PARTY)
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


@pytest.mark.parametrize("name", FIRST_PARTY)
def test_accelerates_lists_real_overrides(name: str) -> None:
    backend = npmoe.get_backend(name)
    cls = type(backend)
    assert cls.accelerates <= {*VERBS, *FUSED}
    own = {n for n in (*VERBS, *FUSED) if n in vars(cls)} if cls is NumpyBackend else set()
    assert cls.accelerates == own
    assert isinstance(backend, FusedExperts) == (cls is NumpyBackend)


def test_transfer_of_host_backends() -> None:
    x = np.arange(3.0)
    for name in ("numpy", "reference"):
        backend = npmoe.get_backend(name)
        assert backend.host_arrays
        assert backend.asarray(x) is x
        assert backend.asnumpy(x) is x
        assert type(backend.asarray([1.0])) is np.ndarray


# The loopback device.


@pytest.fixture
def device() -> Backend:
    return npmoe.get_backend("loopback")


def test_transfer_copies(device: Backend) -> None:
    x = np.arange(6.0).reshape(2, 3)
    there = device.asarray(x)
    x[0, 0] = 7.0
    assert device.asarray(there) is there
    back = device.asnumpy(there)
    assert back.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    back[0, 0] = 9.0
    assert device.asnumpy(there)[0, 0] == 0.0
    assert not device.host_arrays
    assert (there.shape, there.dtype, there.ndim, there.size) == ((2, 3), np.float64, 2, 6)


CONVERT = (
    "loopback: an array must not be converted silently, got a NumPy call on a device array. "
    "Use backend.asnumpy(x)."
)


@pytest.mark.parametrize(
    "call",
    [np.asarray, np.array, np.vstack, np.exp, np.copy, lambda x: np.concatenate([x, x]), np.add],
    ids=["asarray", "array", "vstack", "exp", "copy", "concatenate", "add"],
)
def test_numpy_functions_are_refused(device: Backend, call: Any) -> None:
    there = device.asarray(np.ones(3))
    arguments = (there, there) if call is np.add else (there,)
    with pytest.raises(TypeError) as caught:
        call(*arguments)
    if call in (np.asarray, np.array):
        assert type(caught.value) is DTypeError
        assert str(caught.value) == CONVERT


@pytest.mark.parametrize(
    "mix",
    [
        lambda d, h: d + h,
        lambda d, h: h + d,
        lambda d, h: d @ h,
        lambda d, h: h @ d,
        lambda d, h: d.__iadd__(h),
        lambda d, h: d < h,
        lambda d, h: d.take(h.astype(int)),
        lambda d, h: d[h > 0],
        lambda d, h: d.__setitem__(slice(None), h),
        lambda d, h: d.__array_namespace__().where(d > 0, d, h),
    ],
)
def test_host_arrays_do_not_mix(device: Backend, mix: Any) -> None:
    with pytest.raises(DTypeError) as caught:
        mix(device.asarray(np.ones(3)), np.ones(3))
    assert str(caught.value) == (
        "loopback: operands must be on the device, got a NumPy array of shape (3,). "
        "Move it with backend.asarray(x)."
    )


def test_mixing_in_the_layer(device: Backend) -> None:
    cfg = MoEConfig(hidden_size=4)
    params = npmoe.init_params(cfg)
    there = map_arrays(lambda _, a: device.asarray(a), params)
    x = np.ones((3, 4), np.float32)
    for values, weights in ((x, there), (device.asarray(x), params)):
        with pytest.raises(DTypeError, match=r"^loopback: "):
            npmoe.moe_forward(values, weights, cfg, device)
    with pytest.raises(TypeError, match="LoopbackArray"):
        npmoe.moe_forward(device.asarray(x), there, cfg, "numpy")


@pytest.mark.parametrize(
    ("compute", "what"),
    [
        (lambda x: x + 1, "__add__"),
        (lambda x: 1 - x, "__rsub__"),
        (lambda x: -x, "__neg__"),
        (lambda x: x[0], "__getitem__"),
        (lambda x: x.sum(), "sum"),
        (lambda x: x.astype("float32"), "astype"),
        (lambda x: x.__array_namespace__().exp(x), "exp"),
        (lambda x: x.__array_namespace__().zeros(3), "zeros"),
        (lambda x: x.__setitem__(0, 1.0), "__setitem__"),
        (lambda x: x == 1.0, "__eq__"),
    ],
)
def test_verbs_only(device: Backend, compute: Any, what: str) -> None:
    x = device.asarray(np.ones(3))
    compute(x)
    with loopback.verbs_only():
        with pytest.raises(DTypeError) as caught:
            compute(x)
        x.reshape(3, 1)
        device.asnumpy(device.add(x, x))
        with pytest.raises(DTypeError):  # a verb leaves the refusal as it found it
            compute(x)
    compute(x)
    assert str(caught.value) == (
        f"loopback: arithmetic must happen inside a verb of the backend, got {what}. "
        "Make it a verb, or move the array with backend.asnumpy(x)."
    )


def test_verbs_only_survives_an_error_in_a_verb(device: Backend) -> None:
    x = device.asarray(np.ones(3))
    with loopback.verbs_only():
        with pytest.raises(DTypeError):
            device.add(x, np.ones(3))
        with pytest.raises(DTypeError):
            _ = x + x
    with pytest.raises(ZeroDivisionError), loopback.verbs_only():
        raise ZeroDivisionError
    assert (x + x).shape == (3,)


@pytest.mark.parametrize(
    "fault",
    [
        lambda output: output * 2.0,  # arithmetic outside a verb
        np.asarray,  # a hidden copy to the host
        lambda output: output[0],
    ],
)
def test_a_bad_layer_is_caught(
    device: Backend, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = MoEConfig(hidden_size=4)
    params = map_arrays(lambda _, a: device.asarray(a), npmoe.init_params(cfg))
    x = device.asarray(np.ones((3, 4), np.float32))
    compose = npmoe.layer.compose_forward

    def bad(*arguments: Any) -> Any:
        output, gate_up = compose(*arguments)
        return fault(output), gate_up

    with loopback.verbs_only():
        npmoe.moe_forward(x, params, cfg, device)
        monkeypatch.setattr("npmoe.layer.compose_forward", bad)
        with pytest.raises(DTypeError, match=r"^loopback: "):
            npmoe.moe_forward(x, params, cfg, device)


def test_device_arrays_compute_as_numpy(device: Backend) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 5, (3, 3)).astype(float), rng.integers(1, 5, (3, 3)).astype(float)
    for name in ("add", "sub", "mul", "truediv", "matmul", "pow", "mod", "floordiv"):
        x, y = device.asarray(a), device.asarray(b)
        expected = getattr(a, f"__{name}__")(b)
        assert device.asnumpy(getattr(x, f"__{name}__")(y)).tobytes() == expected.tobytes()
        if name != "matmul":
            swapped = device.asnumpy(getattr(x, f"__r{name}__")(2.0))
            assert swapped.tobytes() == getattr(a, f"__r{name}__")(2.0).tobytes()
        same = x
        x = getattr(x, f"__i{name}__")(y)
        assert x is same
        assert device.asnumpy(x).tobytes() == expected.tobytes()
    x = device.asarray(a)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        got = device.asnumpy(getattr(x, f"__{name}__")(device.asarray(b)))
        np.testing.assert_array_equal(got, getattr(a, f"__{name}__")(b))
    assert device.asnumpy(~(x > 2)).tolist() == (~(a > 2)).tolist()
    assert device.asnumpy(x[1:, 0]).tolist() == a[1:, 0].tolist()
    x[1:, 0] = 9.0
    assert device.asnumpy(x)[:, 0].tolist() == [a[0, 0], 9.0, 9.0]
    assert device.asnumpy(x.T).tolist() == device.asnumpy(x).T.tolist()
    one = device.asarray(np.array(3))
    assert (int(one), float(one), bool(one), [10, 11, 12, 13][one], len(x)) == (3, 3.0, True, 13, 3)
    with pytest.raises(TypeError):
        hash(x)


def test_a_plan_on_the_device(device: Backend) -> None:
    ids = np.array([[2, 0], [2, 1], [0, 2]], np.int32)
    there = device.plan_dispatch(device.asarray(ids), num_experts=4, capacity=2)
    here = plan_dispatch(ids, num_experts=4, capacity=2)
    for name in ("pair_ids", "token_ids", "row_ids", "expert_offsets", "tokens_per_expert"):
        got = device.asnumpy(getattr(there, name))
        assert got.tobytes() == getattr(here, name).tobytes()
    assert there.num_rows == here.num_rows
