"""check_backend: our own pass, every planted mistake dies, every verb is covered."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from kit_reproducers import reproduces
from kit_runs import assert_dies, loose_bounds

from npmoe import BackendUnavailableError, RangeError, ops
from npmoe.backends import Backend, NumpyBackend, ReferenceBackend
from npmoe.testing.conformance.backend import backend_kind, check_backend
from npmoe.testing.conformance.case import WITH_HALVES
from npmoe.testing.conformance.verb_truths import Verb
from npmoe.testing.conformance.verbs import ALSO, VERBS
from npmoe.testing.faults import half
from npmoe.testing.faults.backend import FAULTS

NOT_VERBS = {
    *("name", "accelerates", "host_arrays", "availability"),
    *("asarray", "asnumpy", "synchronize"),
}


@pytest.mark.parametrize(
    ("name", "dtype", "seed"),
    [
        *(("numpy", "float32", 0), ("numpy", "float64", 1), ("numpy", "float32", 2)),
        *(("reference", "float32", 3), ("loopback", "float64", 4)),
        *(("numpy", "float16", 5), ("numpy", "bfloat16", 6)),
        *(("reference", "bfloat16", 7), ("loopback", "float16", 8), ("loopback", "bfloat16", 9)),
    ],
)
def test_our_own_pass(name: str, dtype: str, seed: int) -> None:
    report = check_backend(name, dtype=dtype, seed=seed, quick=True)
    assert report.passed, str(report)
    assert report.target == name
    assert all(r.cases for r in report.results)


def test_every_verb_of_the_contract_has_a_check() -> None:
    verbs = {n for n in dir(Backend) if not n.startswith("_")} - NOT_VERBS
    routing = {"route", "route_backward", "renormalize_kept", "soft_route"}
    assert verbs == set(VERBS) | set(ALSO.values()) | routing
    names = {c.name for c in backend_kind(fused=False).checks}
    assert {f"verb-{n.replace('_', '-')}" for n in VERBS} <= names
    fused = {c.name for c in backend_kind(fused=True).checks}
    assert fused - names == {"experts-fused", "layer-composed-forward", "layer-composed-backward"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fault", [*FAULTS, *half.FAULTS], ids=lambda f: f.name)
def test_every_fault_dies_by_name(fault: object, seed: int, tmp_path: Path) -> None:
    options = dict(fault.options)
    report = check_backend(fault.subject, only=[fault.check], quick=True, seed=seed, **options)
    assert_dies(fault, report, tmp_path)


@pytest.mark.parametrize("dtype", WITH_HALVES)
def test_bounds_are_below_one_percent(dtype: str) -> None:
    assert loose_bounds(backend_kind(fused=True), dtype, seed=5) == []


def damaged(verb: str) -> type[ReferenceBackend]:
    """Return a backend one of whose verbs is off by a little."""
    inner = getattr(ReferenceBackend, verb)

    def off(value: object) -> object:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return value * value.dtype.type(1.001) + value.dtype.type(0.001)
        if isinstance(value, tuple):
            return tuple(off(v) for v in value)
        if hasattr(value, "topk_weights"):
            import dataclasses

            return dataclasses.replace(value, topk_weights=off(value.topk_weights))
        if hasattr(value, "combine"):
            import dataclasses

            return dataclasses.replace(value, combine=off(value.combine))
        if hasattr(value, "row_ids"):
            import dataclasses

            return dataclasses.replace(value, row_ids=value.row_ids[::-1].copy())
        return value

    def run(*args: object, **kwargs: object) -> object:
        return off(inner(*args, **kwargs))

    return type("Damaged", (ReferenceBackend,), {"name": "damaged", verb: staticmethod(run)})


@pytest.mark.parametrize("verb", sorted({*VERBS, "route", "renormalize_kept", "soft_route"}))
def test_every_verb_check_can_fail(verb: str) -> None:
    report = check_backend(damaged(verb), only=[f"verb-{verb.replace('_', '-')}"], quick=True)
    assert not report.passed


class Forgetful(NumpyBackend):
    """Says that it accelerates what it does not have."""

    name: ClassVar[str] = "forgetful"
    accelerates: ClassVar[frozenset[str]] = frozenset({"linear"})


class Unused(ReferenceBackend):
    """Accelerates a verb that the layer never calls."""

    name: ClassVar[str] = "unused"
    accelerates: ClassVar[frozenset[str]] = frozenset({"turbo"})

    def turbo(self) -> None:
        """Do nothing."""


class Writer(ReferenceBackend):
    """Writes to its input."""

    name: ClassVar[str] = "writer"

    @staticmethod
    def scale(x: np.ndarray, factor: float) -> np.ndarray:
        """Scale in place."""
        x *= factor
        return x


class Stateful(NumpyBackend):
    """Returns other bits without the saved tensors."""

    name: ClassVar[str] = "stateful"

    def __init__(self) -> None:
        self.calls = 0

    def experts_forward(self, *args: object, **kwargs: object) -> object:
        """Add one last bit at every other call."""
        self.calls += 1
        output, gate_up = super().experts_forward(*args, **kwargs)
        return output * (1 + self.calls % 2 * np.finfo(output.dtype).eps), gate_up


class Reordering(ReferenceBackend):
    """Rounds once more, where exact layers have nothing to round."""

    name: ClassVar[str] = "reordering"

    @staticmethod
    def activation(gate_up: np.ndarray, cfg: object, *, shared: bool = False) -> np.ndarray:
        """Return another last bit."""
        right = ops.activation(gate_up, cfg, shared=shared)
        return right * (1 + np.finfo(right.dtype).eps)


class Unwritten(ReferenceBackend):
    """Returns new arrays, whatever `out` is."""

    name: ClassVar[str] = "unwritten"

    @staticmethod
    def store(value: np.ndarray, out: np.ndarray | None, accumulate: bool) -> np.ndarray:
        """Ignore `out`."""
        return value


class Empty(ReferenceBackend):
    """Cannot do without tokens."""

    name: ClassVar[str] = "empty"

    @staticmethod
    def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """Look at the first token."""
        x[0]
        return ops.linear(x, weight, bias)


class Flat(ReferenceBackend):
    """Reads weights as if they were contiguous."""

    name: ClassVar[str] = "flat"

    @staticmethod
    def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """Take a transposed array for a plain one."""
        if not weight.flags.c_contiguous and weight.flags.f_contiguous:
            weight = weight.ravel(order="K").reshape(weight.shape)
        return ops.linear(x, weight, bias)


@pytest.mark.parametrize(
    ("subject", "check"),
    [
        (Forgetful, "accelerates-is-true"),
        (Unused, "accelerates-is-true"),
        (Writer, "verb-scale"),
        (Stateful, "save-changes-nothing"),
        (Reordering, "layer-is-exact"),
        (Empty, "no-tokens"),
        (Flat, "any-memory-layout"),
        (Unwritten, "out-is-overwritten"),
        (damaged("grouped_gemm"), "layer-forward"),
        (damaged("row_dot"), "layer-backward"),
        (damaged("grouped_gemm"), "experts-composed"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_every_other_check_can_fail(
    subject: type[ReferenceBackend], check: str, tmp_path: Path
) -> None:
    report = check_backend(subject, only=[check], quick=True)
    assert [f.check for f in report.failures] == [check], str(report)
    if subject.name != "damaged":
        assert reproduces(report, tmp_path)


def test_composed_routes_of_a_fused_backend_can_fail() -> None:
    class Half(NumpyBackend):
        name: ClassVar[str] = "half"
        grouped_gemm = damaged("grouped_gemm").grouped_gemm

    names = ["layer-composed-forward", "layer-composed-backward"]
    report = check_backend(Half(), only=[*names, "layer-forward"], quick=True)
    assert [f.check for f in report.failures] == names


def test_an_instance_without_verbs_is_refused() -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        check_backend(object())
    assert str(caught.value).startswith(
        "check_backend: backend must be a name or have every verb, got object without activation"
    )
    with pytest.raises(RangeError, match="Did you mean 'numpy'"):
        check_backend("numpi")


def test_a_verb_without_truth_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        Verb(run=lambda: (), draw=lambda d: d)
