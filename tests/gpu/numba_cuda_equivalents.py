"""Boundary mutants of the Python kernels that nothing can notice, with the argument for each.

Rows are `equivalents.Equivalent`: patterns for the kernel, the kind, the line of Python and the
PTX, here with the change, "setp.lt... -> setp.le...". Mutants of lines that never run are argued
for in `numba_cuda_uncovered.py`. Every row must be needed: a test looks for its survivors.
"""

from __future__ import annotations

from equivalents import Equivalent

_FLIP, _MOVED, _DROPPED = "comparison flipped", "constant moved", "guard dropped"
_BITS = "at equality both choices have the same bits, since no limit is 0"
_MASKED = "an address of four bytes each, whose last two bits are cleared next"
_THREAD = "it begins as a thread's number, which is at most 255"

EQUIVALENTS = (
    # curves.py
    Equivalent("activation|grouped_gemm", _FLIP, r"^x = low if x < low else x$", r"f32", _BITS),
    Equivalent("activation|grouped_gemm", _FLIP, r"^return high if x > high", r"f32", _BITS),
    Equivalent(
        "activation|grouped_gemm", _FLIP, r"^z = before if g > before else g$", r"f32", _BITS
    ),
    Equivalent(
        "activation|grouped_gemm", _FLIP, r"^value = after if value > after else value$", r"f32",
        _BITS,
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"^z = REAL\(0\) if g <= REAL\(0\) else g$", r"f32",
        "g is a sum that began at 0, which is never -0.0: at equality both choices are 0.0",
    ),
    Equivalent(
        "activation_backward|grouped_gemm", _DROPPED, r"^slope = \(one if g > REAL\(0\)", "bra",
        "ReLU's square has no gated form: in this copy, that of gated curves, it is ReLU",
    ),
    # router.py
    Equivalent(
        "route_rows", _FLIP, r"^top = (x\[e\] if x\[e\]|other if other) > top else top$", r"f32",
        "equal numbers, or zeros of both signs, of which logits minus top are 0 alike",
    ),
    Equivalent(
        "route_rows", _FLIP, r"^small = math\.exp\(x if x < real\(0\) else -x\)$", r"f32",
        "x and -x are zeros, of whose signs exp knows nothing",
    ),
    Equivalent(
        "route_rows", _FLIP, r"^out = \(real\(1\) if x >= real\(0\) else small\)", r"f32",
        "where x is 0, small is exp(0), which is 1",
    ),
    Equivalent(
        "route_rows", _MOVED, r"^log_part = math\.log1p\(small\)$", r"-1061158912 ->",
        "the library halves numbers from 1.5 on; its polynomial holds a bit to either side of that",
    ),
    Equivalent(
        "route_rows", f"{_FLIP}|{_DROPPED}", r"^log_part = math\.log1p\(small\)$",
        r"setp\.lt\.u32 .*, 2139095040 ->|^@%p\d+ bra",
        "whether it is infinite, NaN or negative: small is in 0..1",
    ),
    Equivalent(
        "route_rows", _MOVED, r"^e = natural\(e \+ WARP\)$", r", 32 -> .*, 31;",
        "in steps of 31, lanes look at some experts twice: the best of all is the same",
    ),
    Equivalent(
        "route_rows", _FLIP, r"^best < 0 or key > best_key or \(key == best_key and other",
        r"setp\.ge\.s32",
        "each lane brings an expert of its own: equal ones are -1, and `other >= 0` came before",
    ),
    Equivalent(
        "route_rows", _FLIP, r"^chosen_top = weight if weight > chosen_top", r"f32",
        "equal numbers, or zeros of both signs, of which logits minus chosen_top are 0 alike",
    ),
    Equivalent(
        "route_rows", _FLIP, r"^divisor = chosen_total if chosen_total > eps else eps$", r"f32",
        "at equality both choices have the same bits, since neither is ever -0.0",
    ),
    # plan.py
    Equivalent("count_routes", _FLIP, r"^while i < CHUNK and", r"setp\.gt\.u32.*, 511 ", _THREAD),
    Equivalent(
        "scan_experts|scan_blocks", _FLIP, r"^while first < num_experts:$", r"setp\.lt\.s64",
        "one more pass, over no experts, adds zeros",
    ),
    Equivalent(
        "fill_blocks", _MOVED, r"^if row < expert_offsets", r"add\.s64 .*, 4 -> .*, 5;", _MASKED
    ),
    # words.py: expert_of_entry
    Equivalent(
        "fill_blocks|finish_weights|spread_experts", _MOVED, r"^low, high = 0, num_experts - 1$",
        r", -1 -> .*, 0;",
        "the first entry of expert E, the total, is never at most an entry that is there",
    ),
    Equivalent(
        "fill_blocks|finish_weights|spread_experts", _MOVED,
        r"^middle = natural\(low \+ high \+ 1\) >> 1$", r", 1 -> .*, 2;",
        "a middle further up, where it is not above high, is as good a place to cut; and where it "
        "is, what lies there is at least the total",
    ),
    # rows.py
    Equivalent(
        "combine_rows", f"{_FLIP}|{_DROPPED}", r"^$|^while k < top_k:$",
        r"setp\.gt\.s32 .*, 0 ->|^@%p\d+ bra", "top_k is at least 1: there is a first pass",
    ),
    Equivalent(
        "combine_rows", _MOVED, r"^if row_ids\[p\] >= 0:$",
        r"add\.s64 .*, (4 -> .*, 5|8 -> .*, 9|12 -> .*, 13);", _MASKED,
    ),
    # grouped_simt.py
    Equivalent(
        "grouped_gemm", _FLIP, r"^if block \* BLOCK_M >= num_tokens_post_padded\[0\]",
        r"setp\.ge\.s64",
        "the block behind the last has expert -1 too, which the same line asks for",
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"^tx, ty = |^return int64\(uint32\(i\)\)$|^inside = n < ",
        r"setp\.lt\.u64",
        "whether the column is one of the matrix, asked again behind the branch that said so",
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"^scratch\[RIGHT \+ k \* RIGHT_STRIDE \+ c\] = value$", r", 0 ->",
        "column 0 belongs to the first of four copies; in this one n is -1 or at least 16",
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"^if sources\[r\] >= 0 and k0 \+ k < K:$", r"setp\.lt\.s32.*, 0 ->",
        "row 0 and token 0 are the first of their expert; this copy has rows 16 to 63 of a block",
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"^while k0 < K:$", r"setp\.lt\.s64",
        "one more pass, of no depth, adds zeros",
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"^while r < BLOCK_M:$", r"setp\.gt\.u32 .*, (511|2047) ->", _THREAD
    ),
    Equivalent(
        "grouped_gemm", _FLIP, r"^n = n if c < WIDTH else n \+ half$", r", 32 ->",
        "c is a lane there: it is below 32",
    ),
    Equivalent(
        "grouped_gemm", _MOVED, r"^c = natural\(c \+ WARP\)$", r", 32 -> .*, 33;",
        "half of a tile is as wide as a warp: every lane makes one pass",
    ),
    # wgrad_simt.py
    Equivalent(
        "grouped_wgrad", f"{_FLIP}|{_DROPPED}", r"^while r0 < end:$",
        r"setp\.lt\.u(32|64)|^@%p\d+ bra", "one more pass, of no rows, adds zeros",
    ),
    Equivalent("grouped_wgrad", _FLIP, r"^while r < TILE and", r"setp\.gt\.u32.*, 2047 ", _THREAD),
    Equivalent(
        "grouped_wgrad", _MOVED, r"^token = quotient\(pair_ids\[row\], top_k\)$",
        r"add\.s64 .*, 32 -> .*, 33;", _MASKED,
    ),
)  # fmt: skip
