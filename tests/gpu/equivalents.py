"""Boundary mutants that nothing can notice, with the argument for each.

A mutant is listed by its entry, kind, line of source and text of PTX. Only mutants that survive are
looked up here: those that are noticed need no argument. Mutants of what never runs are argued for
in `uncovered.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Equivalent:
    """A family of equivalent mutants."""

    entry: str  # a pattern, like all others
    kind: str
    code: str  # the line of source
    ptx: str
    why: str

    def fits(self, entry: str, kind: str, code: str, text: str) -> bool:
        """Say whether a mutant belongs here."""
        given = ((self.entry, entry), (self.kind, kind), (self.code, code), (self.ptx, text))
        return all(re.search(pattern, what) for pattern, what in given)


_FLIP, _MOVED = "comparison flipped", "constant moved"
_SAME = "at equality both choices are the same number"

EQUIVALENTS = (
    Equivalent(
        "", _FLIP, r"x < low|x > high|c\.before \? c\.before|value > c\.after \? c\.after|"
        r"p\.value > c\.after \? c\.after|z = g <= 0 \?|top = (x|other)|chosen_top = x|"
        r"chosen_total > eps", r"setp\.\w+\.f", _SAME,
    ),
    Equivalent(
        "", _FLIP, r"return erff?\(", r"setp\.\w+\.f",
        "the library's choice of a polynomial or a scaling: both are right at the edge",
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"num_tokens_post_padded\[0\]\) return", "setp",
        "the block behind the last has expert -1 too, so that the next line returns",
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"const bool inside|ws\[k \* STRIDE_W",
        r"setp\.\w+\.s32 .*, (0|-1)$",
        "row 0 and column 0 are copied by the first of the unrolled copies alone",
    ),
    Equivalent(
        "grouped_gemm|grouped_wgrad", f"{_FLIP}|guard dropped",
        r"for \(int k0 = 0|for \(int r0 = begin", "",
        "one more pass over no depth, or no rows, adds zeros",
    ),
    Equivalent(
        "grouped_gemm", f"{_MOVED}|{_FLIP}", r"for \(int c = lane|for \(int r = warp", "",
        "the counter alone: as many passes either way, the addresses being counted apart",
    ),
    Equivalent(
        "count_routes|finish_weights|row_dot|route_rows", _MOVED,
        r"for \(int (e = threadIdx|i = lane|e = lane)", r"add\.s32",
        "the counter of a loop unrolled by four, whose last three steps it has to spare",
    ),
    Equivalent(
        "place_routes", _MOVED, r"for \(int i = 0; i < CHUNK", r"add\.s32",
        "the counter alone: eight passes either way",
    ),
    Equivalent(
        "scan_experts|scan_blocks", f"{_MOVED}|{_FLIP}", r"for \(int first = 0", "",
        "one more pass, over no experts, adds zeros",
    ),
    Equivalent(
        "fill_blocks|finish_weights|spread_experts", _MOVED,
        r"int low = 0, high = num_experts - 1", "",
        "the first row of expert E, the total, is never at most a row that is there",
    ),
    Equivalent(
        "fill_blocks|finish_weights|spread_experts", _MOVED, r"int middle = \(low \+ high", "",
        "a middle further up, where it is not above high, is as good a place to cut",
    ),
    Equivalent(
        "combine_rows", f"{_FLIP}|guard dropped", r"for \(int64 p = token|const int64 token",
        r"setp\.lt\.s64|^@%p\d+ bra",
        "top_k is at least 1, so that the loop has a first pass whatever is asked",
    ),
    Equivalent(
        "segment_sum", _MOVED, r"for \(int64 row = expert_offsets\[e\]", r", 1$",
        "the larger of begin + 1 and end, asked where begin < end",
    ),
    Equivalent(
        "route_rows", f"{_FLIP}|{_MOVED}", r"log1pf?\(", "",
        "the library reduces log1p to an interval: one step further is right too",
    ),
)  # fmt: skip


def argument_for(entry: str, kind: str, code: str, text: str) -> str | None:
    """Return why a mutant cannot be noticed, or None."""
    return next((e.why for e in EQUIVALENTS if e.fits(entry, kind, code, text)), None)
