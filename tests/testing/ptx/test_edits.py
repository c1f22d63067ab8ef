"""Edits: alternatives for single lines, compiled along with the original."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_cases import kernel, needs_compiler

from npmoe import RangeError
from npmoe.testing import ptx

pytestmark = needs_compiler
TEXT = kernel(
    """
{ .reg .b32 t;
add.u32 t, %r1, 10;
mov.u32 %r3, t; }
add.u32 %r3, %r3, 1; add.u32 %r3, %r3, 2;
setp.ge.u32 %p1, %r1, 100;
@%p1 bra FAR;
mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd1, %rd5; st.global.u32 [%rd6], %r3;
FAR:"""
)


def line_of(words: str) -> int:
    return next(k for k, row in enumerate(TEXT.split("\n"), 1) if words in row)


EDITS = {
    "other constant": ptx.Edit(line_of("%r1, 10"), "add.u32 t, %r1, 20;"),
    "deleted": ptx.Edit(line_of("%r1, 10"), ""),
    "whole line": ptx.Edit(line_of("%r3, 1;"), "add.u32 %r3, %r3, 100;"),
    "own register": ptx.Edit(
        line_of("%r3, 1;"), "{ .reg .b32 t; mov.u32 t, 5; add.u32 %r3, %r3, t; }"
    ),
    "never branches": ptx.Edit(line_of("bra FAR"), ""),
    "always branches": ptx.Edit(line_of("bra FAR"), "bra FAR;"),
    "negated": ptx.Edit(line_of("bra FAR"), "@!%p1 bra FAR;"),
    "several": ptx.Edit(
        line_of("setp"), "add.u32 %r3, %r3, 1;\nadd.u32 %r3, %r3, 1;\nsetp.ge.u32 %p1, %r1, 2;"
    ),
}
LANES = np.arange(4)
RESULTS = {
    None: LANES + 13,
    "other constant": LANES + 23,
    "whole line": LANES + 110,
    "own register": LANES + 15,
    "never branches": LANES + 13,
    "always branches": LANES * 0,
    "negated": LANES * 0,
    "several": np.where(LANES < 2, LANES + 15, 0),
}


@pytest.fixture(scope="module")
def module():
    return ptx.load(TEXT, edits=EDITS)


@pytest.mark.parametrize("edit", RESULTS)
def test_an_edit_acts_alone(module, edit):
    out = np.zeros(4, np.uint32)
    module.launch("k", 1, 4, [out], edit=edit, schedule=3)
    assert (out == RESULTS[edit]).all()


def test_a_deleted_definition_is_found(module):
    with pytest.raises(
        ptx.PtxFinding, match="reads register %r3, which this thread has not"
    ) as caught:
        module.launch("k", 1, 4, [np.zeros(4, np.uint32)], edit="deleted")
    assert caught.value.kind == "undefined-register"


def test_a_finding_in_an_edit_shows_its_text():
    edit = ptx.Edit(line_of("st.global"), "st.global.u32 [%rd1+64], %r3;")
    module = ptx.load(TEXT, edits={"out": edit})
    with pytest.raises(ptx.PtxFinding, match=r"`st\.global\.u32 \[%rd1\+64\], %r3`") as caught:
        module.launch("k", 1, 4, [np.zeros(4, np.uint32)], edit="out")
    assert caught.value.place.line == edit.line


def test_coverage_is_that_of_the_original_text(module):
    plain = ptx.launch(TEXT, "k", 1, 4, [np.zeros(4, np.uint32)]).coverage
    with_edits = module.launch("k", 1, 4, [np.zeros(4, np.uint32)]).coverage
    assert plain.instructions == with_edits.instructions
    assert plain.counts == with_edits.counts


def test_refusals(module):
    with pytest.raises(
        RangeError, match=r"launch: edit must name an edit of k that was given to load, got 'x'"
    ):
        module.launch("k", 1, 4, [np.zeros(4, np.uint32)], edit="x")
    with pytest.raises(
        RangeError, match=r"the edit 'far' must be of a line with an instruction, got 999"
    ):
        ptx.load(TEXT, edits={"far": ptx.Edit(999, "")})
    with pytest.raises(ptx.PtxSyntaxError, match=r"the edit 'jump' of PTX line \d+ has a label"):
        ptx.load(TEXT, edits={"jump": ptx.Edit(line_of("setp"), "X: bra X;")})
    with pytest.raises(ptx.PtxUnsupportedError, match="wgmma"):
        ptx.load(TEXT, edits={"new": ptx.Edit(line_of("setp"), "wgmma.fence.sync.aligned;")})
