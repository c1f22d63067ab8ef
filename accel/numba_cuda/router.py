"""The usual router in one pass over a token's logits: scores, choice and weights.

The plan: a warp for each token, four tokens in a block; lane l looks at experts l, l + 32, ... and
keeps their scores in shared memory, (4, E). The reference is `npmoe.routing.route`; the twin is
`accel/kernels/router.cu`.

Experts are chosen by their logits if `by_logits`, else by their scores, after `bias` if there is
one; equal keys go to the lower expert. Weights are the scores, or with `among_chosen` the softmax
of the chosen logits alone. A row whose largest logit is not finite (NaN counts as largest) is
broken; a masked row may hold anything. Both get probs 0 and weights 0; ids are -1, but 0..K-1 in
a broken row under the policy CLAMP. `broken` is set under the policy RAISE.
"""

import math
from typing import Any

from numba import cuda
from numba.cuda.types import boolean, int32

from .words import ALL_LANES, TYPES, WARP, bounds, inline, natural, warp_sum

SOFTMAX, SIGMOID = 0, 1  # and the third: square root of softplus
RAISE, CLAMP = 0, 1  # and the third: drop
WARPS = 4


def route_rows(REAL: str) -> Any:
    """Return the kernel: grid ceil(T / 4), 128 threads, 4 * E numbers of shared memory."""
    real = TYPES[REAL]
    MATRIX, VECTOR, IDS, FLAGS, INTS = (
        real[:, ::1], real[::1], int32[:, ::1], boolean[::1], int32[::1],
    )  # fmt: skip

    @inline
    def score(score_fn, x, top):
        if score_fn == SOFTMAX:
            out = math.exp(x - top)  # divided by the sum later
        else:
            small = math.exp(x if x < real(0) else -x)
            if score_fn == SIGMOID:
                out = (real(1) if x >= real(0) else small) / (real(1) + small)
            else:
                log_part = math.log1p(small)
                if x < real(0):  # this form lasts until exp(x / 2) is 0
                    ratio = math.sqrt(log_part / small) if small > real(0) else real(1)
                    out = math.exp(x * real(0.5)) * ratio
                else:
                    out = math.sqrt(x + log_part)
        return out

    @bounds(WARPS * WARP)
    def kernel(
        logits: MATRIX, bias: VECTOR, token_mask: FLAGS, num_tokens: int32, num_experts: int32,
        top_k: int32, score_fn: int32, by_logits: int32, among_chosen: int32, normalize: int32,
        eps: real, eps_is_maximum: int32, factor: real, policy: int32, probs: MATRIX, ids: IDS,
        weights: MATRIX, valid: FLAGS, broken: INTS,
    ):  # fmt: skip
        shared = cuda.shared.array(0, real)
        thread = natural(cuda.threadIdx.x)
        lane, warp = thread % WARP, thread // WARP
        t = natural(cuda.blockIdx.x) * WARPS + warp
        if t >= num_tokens:
            return
        mine = warp * num_experts  # where this warp's scores begin
        infinity = real(math.inf)
        x, out_probs, out_ids, out_weights = logits[t], probs[t], ids[t], weights[t]

        top, numbers = -infinity, True
        e = lane
        while e < num_experts:
            numbers = numbers and x[e] == x[e]
            top = x[e] if x[e] > top else top
            e = natural(e + WARP)
        step = WARP // 2
        while step > 0:
            other = cuda.shfl_xor_sync(ALL_LANES, top, step)
            top = other if other > top else top
            step >>= 1
        masked = token_mask.size != 0 and not token_mask[t]
        finite = top > -infinity and top < infinity
        usable = cuda.all_sync(ALL_LANES, numbers) and finite
        if lane == 0:
            valid[t] = usable and not masked
        if masked or not usable:
            e = lane
            while e < num_experts:
                out_probs[e] = real(0)
                e = natural(e + WARP)
            k = lane
            while k < top_k:
                out_ids[k] = k if policy == CLAMP and not masked else -1
                out_weights[k] = real(0)
                k = natural(k + WARP)
            if lane == 0 and policy == RAISE and not masked:
                cuda.atomic.exch(broken, 0, 1)
            return

        total = real(0)
        e = lane
        while e < num_experts:
            key = score(score_fn, x[e], top)
            shared[natural(mine + e)] = key
            total += key
            e = natural(e + WARP)
        total = warp_sum(total)
        e = lane
        while e < num_experts:
            at = natural(mine + e)
            if score_fn == SOFTMAX:
                shared[at] = shared[at] / total
            out_probs[e] = shared[at]
            e = natural(e + WARP)
        cuda.syncwarp()

        # Next comes the largest key behind the last one, in the order (key down, expert up).
        last_key, last = infinity, -1
        chosen_total, chosen_top = real(0), -infinity
        k = 0
        while k < top_k:
            best_key, best = real(0), int32(-1)
            e = lane
            while e < num_experts:
                key = x[e] if by_logits else shared[natural(mine + e)]
                if bias.size:
                    key += bias[e]
                if (key < last_key or (key == last_key and e > last)) and (
                    best < 0 or key > best_key
                ):
                    best, best_key = int32(e), key
                e = natural(e + WARP)
            step = WARP // 2
            while step > 0:
                other = cuda.shfl_xor_sync(ALL_LANES, best, step)
                key = cuda.shfl_xor_sync(ALL_LANES, best_key, step)
                if other >= 0 and (
                    best < 0 or key > best_key or (key == best_key and other < best)
                ):
                    best, best_key = other, key
                step >>= 1
            last, last_key = best, best_key
            weight = real(0)
            if best < 0:  # a key that is not a number: the bias's doing
                if lane == 0:
                    cuda.atomic.exch(broken, 0, 1)
            elif among_chosen:
                weight = x[natural(best)]  # for now
                chosen_top = weight if weight > chosen_top else chosen_top
            else:
                weight = shared[natural(mine + best)]
                chosen_total += weight
            if lane == 0:
                out_ids[natural(k)] = best
                out_weights[natural(k)] = weight
            k += 1
        if lane > 0:
            return

        if among_chosen:
            some = chosen_top > -infinity  # else only what can never be chosen was chosen
            total = real(0)
            k = 0
            while k < top_k:
                weight = real(0)
                if some and out_ids[k] >= 0:
                    weight = math.exp(out_weights[k] - chosen_top)
                out_weights[k] = weight
                total += weight
                k = natural(k + 1)
            chosen_total = real(0)
            k = 0
            while k < top_k:
                weight = out_weights[k] / total if some else real(0)
                out_weights[k] = weight
                chosen_total += weight
                k = natural(k + 1)
        divisor = real(1)
        if normalize:
            if eps_is_maximum:
                divisor = chosen_total if chosen_total > eps else eps
            else:
                divisor = chosen_total + eps
            if not divisor > real(0):
                divisor = real(1)
        k = 0
        while k < top_k:
            out_weights[k] = out_weights[k] / divisor * factor
            k = natural(k + 1)

    return kernel
