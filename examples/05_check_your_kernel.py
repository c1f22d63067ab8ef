"""A stranger's align function has an off-by-one. It is found, shrunk and shown.

The function is written for vLLM's contract: it sorts the routes (token t's choice k is route
t*K + k) by expert and pads every expert's list to whole blocks, so that a kernel can work block by
block. Run it anywhere; it needs NumPy alone. Yours is checked the same way, or from the command
line with `npmoe check your_module:your_function`.
"""

import numpy as np

from npmoe.testing import check_align


def their_align(topk_ids, block_size, num_experts, expert_map=None):
    """Sort routes into blocks of one expert each."""
    flat = topk_ids.ravel()
    num_routes = flat.size
    sorted_token_ids = np.full(num_routes + num_experts * (block_size - 1), num_routes, np.int32)
    if num_routes < num_experts:
        sorted_token_ids = sorted_token_ids[: num_routes * block_size]
    expert_ids = np.full(-(-len(sorted_token_ids) // block_size), -1, np.int32)
    filled = 0
    for expert in range(num_experts):
        routes = np.flatnonzero(flat == expert)
        blocks = len(routes) // block_size + 1 if len(routes) else 0
        sorted_token_ids[filled : filled + len(routes)] = routes
        local = expert if expert_map is None else expert_map[expert]
        expert_ids[filled // block_size : filled // block_size + blocks] = local
        filled += blocks * block_size
    return sorted_token_ids, expert_ids, filled


if __name__ == "__main__":
    report = check_align(their_align, quick=True)
    print(report)
    print("\nThe first finding as a script that needs NumPy and their function alone:\n")
    print(report.failures[0].reproducer)
