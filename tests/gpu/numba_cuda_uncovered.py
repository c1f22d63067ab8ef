"""PTX of the Python kernels that the sharp cases do not reach: how many instructions of each line
of Python, and why.

By a pattern for the target's name; several may fit. A test compares both ways: a listed line that
runs fails, and so does an unlisted one that does not. Instructions of the library stand at the line
that calls it.
"""

from __future__ import annotations

import re

_THREAD = "the loop begins with a thread's number, for which there is a first pass whatever it is"
_ONE_PASS = "half of a tile is as wide as a warp: no lane goes round a second time"
_K = "top_k is at least 1: this is what would be done if the loop had no pass"
_E = "there is at least one expert, so that this loop has a pass"
_SQUARE = "ReLU's square has no gated form, and this is the copy for gated curves"
_LOG = "the branches of log1p for arguments that exp(-|x|), which is in 0..1, does not have"

UNCOVERED: dict[str, dict[str, tuple[int, str]]] = {
    r"^grouped_gemm": {"while r < BLOCK_M:": (1, _THREAD)},
    r"^grouped_gemm ACTIVATE-gated-\d+-float32": {"while c < WIDTH:": (2, _ONE_PASS)},
    r"^grouped_gemm ACTIVATE-gated-\d+-float64": {"while c < WIDTH:": (1, _ONE_PASS)},
    r"^grouped_gemm ACTIVATE_BACKWARD-gated|^activation_backward": {
        "value = z if kind == RELU else z * z": (1, _SQUARE),
        "slope = (one if g > REAL(0) else REAL(0)) if kind == RELU else z + z": (3, _SQUARE),
    },
    r"^grouped_wgrad": {"while r < TILE and m0 + r < M:": (1, _THREAD)},
    r"^combine_rows": {
        "def kernel(": (2, _K),
        "while k < top_k:": (1, _K),
        "while n < N:": (2, _K),
        "out[token, n] = total": (5, _K),
        "n = natural(n + THREADS)": (1, _K),
        "return int64(uint32(i))": (1, _K),
    },
    r"^route_rows": {"while k < top_k:": (3, _K)},
    r"^route_rows float32": {"log_part = math.log1p(small)": (6, _LOG)},
    r"^route_rows float64": {"log_part = math.log1p(small)": (11, _LOG)},
    r"^count_routes": {
        "while i < CHUNK and chunk * CHUNK + i < num_routes:": (1, _THREAD),
    },
    r"^scan_": {"while first < num_experts:": (1, _E)},
}


def allowed_lines(target: str) -> dict[str, int]:
    """Return how many instructions of each line need not run in a target."""
    found: dict[str, int] = {}
    for pattern, lines in UNCOVERED.items():
        if re.search(pattern, target):
            found |= {code: count for code, (count, _) in lines.items()}
    return found
