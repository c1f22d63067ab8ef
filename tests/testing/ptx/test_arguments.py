"""Every refusal before a launch, word by word; and what a launch accepts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from ptx_cases import kernel, needs_compiler

from npmoe import DTypeError, RangeError, ShapeError
from npmoe.testing import ptx

pytestmark = needs_compiler
MANY = kernel(
    """ld.param.f32 %f1, [x]; ld.param.s16 %r3, [h]; ld.param.f64 %fd, [y];
    ld.param.u8 %r4, [s+2]; ld.param.b32 %r5, [w];
    st.global.f32 [%rd1], %f1; st.global.u32 [%rd1+4], %r3; st.global.f64 [%rd1+8], %fd;
    st.global.u32 [%rd1+16], %r4; st.global.u32 [%rd1+20], %r5;""",
    ".u64 p0, .f32 x, .u16 h, .f64 y, .align 1 .b8 s[3], .b32 w",
    ".reg .f64 %fd;",
)
ONE = kernel("st.global.u32 [%rd1], 1;")
TWO = kernel("ld.param.u32 %r3, [n]; st.global.u32 [%rd1], %r3;", ".u64 p0, .u32 n")
A = np.zeros(8, np.uint32)


def test_scalars_of_every_kind():
    out = np.zeros(6, np.uint32)
    ptx.launch(MANY, "k", 1, 1, [out, 1.5, -2, np.float64(2.25), b"\1\2\3", np.float32(1.0)])
    assert out[0] == np.float32(1.5).view(np.uint32)
    assert out[1] == 2**32 - 2
    assert out[2:4].view(np.float64)[0] == 2.25
    assert (out[4], out[5]) == (3, 0x3F800000)


def test_a_zero_dimensional_array_is_a_scalar_unless_it_is_wrapped():
    value = np.array(7, np.uint32)
    ptx.launch(TWO, "k", 1, 1, [A, value])
    assert A[0] == 7
    with pytest.raises(ptx.PtxFinding, match="read-only"):
        ptx.launch(ONE, "k", 1, 1, [ptx.ReadOnly(value)])


@pytest.mark.parametrize(
    ("text", "args", "options", "kind", "message"),
    [
        (
            ONE,
            [],
            {},
            ShapeError,
            "launch: args must hold 1 values for k, got 0. Its parameters are: p0 (.u64).",
        ),
        (
            TWO,
            [A, A],
            {},
            DTypeError,
            "launch: args[1] must be a scalar of type .u32 for n, "
            "got an array of shape (8,). "
            "Only .u64 and .b64 parameters take arrays.",
        ),
        (
            ONE,
            [np.zeros((4, 4))[:, 1]],
            {},
            ShapeError,
            "launch: args[0] must be C-contiguous, "
            "got strides (32,) for shape (4,). "
            "A kernel sees bytes; "
            "pass numpy.ascontiguousarray(...) and "
            "copy back.",
        ),
        (
            ONE,
            [np.array([None])],
            {},
            DTypeError,
            "launch: args[0] must hold numbers, got dtype object.",
        ),
        (TWO, [A, "x"], {}, DTypeError, "launch: args[1] must be a number for n (.u32), got str."),
        (
            TWO,
            [A, np.int64(3)],
            {},
            DTypeError,
            "launch: args[1] must have 4 bytes for n (.u32), "
            "got int64. A driver would read past it or leave "
            "bytes unset.",
        ),
        (
            TWO,
            [A, 1.5],
            {},
            DTypeError,
            "launch: args[1] must be an integer for n (.u32), got 1.5.",
        ),
        (
            TWO,
            [A, np.float32(1)],
            {},
            DTypeError,
            "launch: args[1] must be an integer for n (.u32), got float32.",
        ),
        (
            TWO,
            [A, 2**32],
            {},
            RangeError,
            "launch: args[1] must fit 4 bytes for n (.u32), got 4294967296.",
        ),
        (
            MANY,
            [A, 1.0, 1, 1.0, b"ab", 1],
            {},
            DTypeError,
            "launch: args[4] must be bytes of length 3 for the struct s, got b'ab'.",
        ),
        (
            ONE,
            [A],
            {"entry": "z"},
            RangeError,
            "launch: entry must name a kernel of the module, got 'z'. It has: k.",
        ),
        (
            ONE,
            [A],
            {"grid": 0},
            RangeError,
            "launch: grid must be one to three positive integers, got 0.",
        ),
        (
            ONE,
            [A],
            {"block": (1, 2, 3, 4)},
            RangeError,
            "launch: block must be one to three positive integers, got (1, 2, 3, 4).",
        ),
        (
            ONE,
            [A],
            {"block": (32, 33)},
            RangeError,
            "launch: block must have at most 1024 threads and z at most 64, got (32, 33, 1).",
        ),
        (
            ONE,
            [A],
            {"grid": (1, 70000)},
            RangeError,
            "launch: grid must be at most (2**31 - 1, 65535, 65535), got (1, 70000, 1).",
        ),
        (
            ONE,
            [A],
            {"shared_mem": 232449},
            RangeError,
            "launch: shared_mem must be from 0 to 232448 bytes (227 KiB, the most of any device), "
            "got 232449.",
        ),
        (
            ONE,
            [A],
            {"schedule": "random"},
            RangeError,
            "launch: schedule must be 'in-order', "
            "'reversed' or a seed (an integer >= 0), "
            "got 'random'.",
        ),
        (
            ONE,
            [A],
            {"schedule": True},
            RangeError,
            "launch: schedule must be 'in-order', "
            "'reversed' or a seed (an integer >= 0), "
            "got True.",
        ),
    ],
)
def test_refusals(
    text: str, args: list[Any], options: dict[str, Any], kind: type[Exception], message: str
):
    given = {"entry": "k", "grid": 1, "block": 1} | options
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        ptx.launch(text, given.pop("entry"), given.pop("grid"), given.pop("block"), args, **given)


def test_uninitialized_arrays_must_be_writeable():
    fixed = np.zeros(4, np.uint32)
    fixed.flags.writeable = False
    with pytest.raises(
        RangeError,
        match=r"args\[0\] must be writeable, got a read-only array marked Uninitialized\. Nobody",
    ):
        ptx.launch(ONE, "k", 1, 1, [ptx.Uninitialized(fixed)])


def test_load_of_unknown_entries():
    with pytest.raises(
        RangeError, match=r"^load: entries must name kernels of the module, got 'z'\. It has: k\.$"
    ):
        ptx.load(ONE, ["z"])


def test_the_parsed_module_tells_what_a_driver_needs():
    module = ptx.parse(MANY)
    entry = module.entries["k"]
    assert (module.version, module.target) == ("8.0", "sm_80")
    assert [(p.name, p.type, p.size, p.align, p.elements) for p in entry.parameters] == [
        ("p0", "u64", 8, 8, 0),
        ("x", "f32", 4, 4, 0),
        ("h", "u16", 2, 2, 0),
        ("y", "f64", 8, 8, 0),
        ("s", "b8", 3, 1, 3),
        ("w", "b32", 4, 4, 0),
    ]
    for i in entry.instructions:
        assert i.text.split()[-1] in module.lines[i.line - 1]
    load = next(i for i in entry.instructions if i.opcode == "ld.param.u8")
    assert load.operands[1].base.name == "s"
    assert load.operands[1].offset == 2


def test_a_block_larger_than_the_kernel_was_compiled_for():
    bounded = ONE.replace(")\n{", ")\n.maxntid 16, 2, 1\n.minnctapersm 1\n{")
    ptx.launch(bounded, "k", 1, 1, [A])
    with pytest.raises(
        RangeError,
        match=r"^launch: block must have at most 32 threads for k, got \(33, 1, 1\)\. "
        r"It was compiled with \.maxntid \(__launch_bounds__\)\.$",
    ):
        ptx.launch(bounded, "k", 1, 33, [A])
    exact = ONE.replace(")\n{", ")\n.reqntid 1\n{")
    ptx.launch(exact, "k", 1, 1, [A])
    with pytest.raises(RangeError, match=r"block must be \(1, 1, 1\) for k, got \(2, 1, 1\)"):
        ptx.launch(exact, "k", 1, 2, [A])


def test_one_array_passed_twice_is_one_allocation():
    """The write through one name and the read through the other are of the same bytes: a race."""
    text = kernel(
        "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u32 [%rd1], %r1; @!%p1 ld.global.u32 %r3, [%rd2];",
        ".u64 p0, .u64 p1",
    )
    with pytest.raises(ptx.PtxFinding, match="race"):
        ptx.launch(text, "k", 1, 2, [A, A])
    ptx.launch(text, "k", 1, 2, [A, A.copy()])
    ptx.launch(text, "k", 1, 2, [A[:4], A[4:]])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([A, A[1:]], "launch: args[1] must not overlap args[0], got memory in common."),
        (
            [A, ptx.ReadOnly(A)],
            "launch: args[1] must not overlap args[0], got the same memory",
        ),
    ],
)
def test_arguments_that_overlap(args: list[Any], words: str):
    with pytest.raises(RangeError, match=f"^{re.escape(words)}"):
        ptx.launch(kernel("", ".u64 p0, .u64 p1"), "k", 1, 1, args)
    read_only = [ptx.ReadOnly(a.array if isinstance(a, ptx.ReadOnly) else a) for a in args]
    ptx.launch(kernel("", ".u64 p0, .u64 p1"), "k", 1, 1, read_only)


def test_an_empty_array_has_no_byte():
    with pytest.raises(ptx.PtxFinding, match=r"byte offset 0 of 0 \(element 0 of 0 uint32\)"):
        ptx.launch(ONE, "k", 1, 1, [np.zeros(0, np.uint32)])
