"""PTX that the sharp cases do not reach: how many instructions of each source line, and why.

By entry, REAL ("" where there is none) and form (`key_of`). A test compares both ways: a listed
line that runs fails, and so does an unlisted one that does not.
"""

from __future__ import annotations

from accel.device.kernel import Kernel
from accel.device.products import ACTIVATE

_K = "top_k is at least 1, so that this loop has a pass"
_E = "there is at least one expert, so that this loop has a pass"
_LOG = "the branches of log1p for arguments that exp(-|x|), which is in 0..1, does not have"
_SOME = "a second copy of the question `some`, where the first one has been answered"
_EXP = "exp of what lies between -745 and -708, in a copy where a test of `some` precedes it"

_NO_SLOTS = {
    "for (int64 p = token * top_k; p < (token + 1) * top_k; p++) {": (1, _K),
    "out[token * N + n] = sum;": (6, _K),
    "for (int n = threadIdx.x; n < N; n += blockDim.x) {": (3, _K),
}
_HALF = "for (int c = lane; c < (EPILOGUE == ACTIVATE && GATED ? TILE_N / 2 : TILE_N); c += 32) {"
_CHOICES = "for (int k = 0; k < top_k; k++) {"
_LAST = "for (int k = 0; k < top_k; k++) w[k] = w[k] / divisor * factor;"
_AMONG = "w[k] = some && ids[t * top_k + k] >= 0 ? exponential(w[k] - chosen_top) : REAL(0);"

_ONCE = "half a tile is 32 columns, one for each lane, so that this loop has no second pass"


def key_of(kernel: Kernel) -> tuple[str, str, str]:
    """Return where a kernel's lines stand."""
    options = dict(kernel.options)
    halves = options.get("EPILOGUE") == ACTIVATE and options.get("GATED")
    return kernel.entry, str(options.get("REAL", "")), "ACTIVATE GATED" if halves else ""


UNCOVERED: dict[tuple[str, str, str], dict[str, tuple[int, str]]] = {
    ("combine_rows", "float", ""): _NO_SLOTS,
    ("combine_rows", "double", ""): _NO_SLOTS,
    ("route_rows", "float", ""): {
        "const REAL log_part = log1pf(small), root = sqrtf((x > 0 ? x : REAL(0)) + log_part);": (
            6,
            _LOG,
        ),
        _CHOICES: (3, _K),
        _LAST: (1, _K),
        _AMONG: (1, _SOME),
    },
    ("route_rows", "double", ""): {
        "const REAL log_part = log1p(small), root = sqrt((x > 0 ? x : REAL(0)) + log_part);": (
            11,
            _LOG,
        ),
        _CHOICES: (3, _K),
        _LAST: (1, _K),
        _AMONG: (1, _SOME),
        "return exp(x);": (12, _EXP),
    },
    ("scan_experts", "", ""): {
        "for (int first = 0; first < num_experts; first += 1024) {": (1, _E),
    },
    ("scan_blocks", "", ""): {
        "for (int first = 0; first < num_experts; first += 1024) {": (1, _E),
    },
    ("grouped_gemm", "double", "ACTIVATE GATED"): {
        _HALF: (1, _ONCE),
    },
}
