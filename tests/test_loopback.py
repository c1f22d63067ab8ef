"""The loopback device: it refuses the host, and arithmetic outside the verbs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import npmoe
import npmoe.routed_path
from accel import loopback
from npmoe import DTypeError, MoEConfig
from npmoe.backends import Backend
from npmoe.dispatch import plan_dispatch
from npmoe.tree import map_arrays


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
    compose = npmoe.routed_path.compose_forward

    def bad(*arguments: Any, **options: Any) -> Any:
        output, gate_up = compose(*arguments, **options)
        return fault(output), gate_up

    with loopback.verbs_only():
        npmoe.moe_forward(x, params, cfg, device)
        monkeypatch.setattr("npmoe.routed_path.compose_forward", bad)
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
