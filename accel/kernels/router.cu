// The usual router in one pass over a token's logits: scores, choice and weights; a warp per token.
//
// -D REAL. Grid ceil(T / 4), 128 threads, 4 * E * sizeof(REAL) dynamic shared memory.
//
// Experts are chosen by their logits if `by_logits`, else by their scores, after `bias` if there is
// one; equal keys go to the lower expert. Weights are the scores, or with `among_chosen` the softmax
// of the chosen logits alone. A row whose largest logit is not finite (NaN counts as largest) is
// broken; a masked row may hold anything. Both get probs 0 and weights 0; ids are -1, but 0..K-1 in
// a broken row under the policy CLAMP. `broken` is set under the policy RAISE.
//
// But for the first, loops stay loops: what they read is near, and unrolled the kernel is twice
// as long.
#include "curves.cuh"

enum { SOFTMAX, SIGMOID, SQRTSOFTPLUS };
enum { RAISE, CLAMP, DROP };

DEVICE REAL score(int score_fn, REAL x, REAL top) {
    const REAL one = 1;
    if (score_fn == SOFTMAX) return exponential(x - top);  // divided by the sum later
    const REAL small = exponential(x < 0 ? x : -x);
    if (score_fn == SIGMOID) return (x >= 0 ? one : small) / (one + small);
#ifdef DOUBLE
    const REAL log_part = log1p(small), root = sqrt((x > 0 ? x : REAL(0)) + log_part);
    const REAL half = exp(x / 2);
    const REAL ratio = small > 0 ? sqrt(log_part / small) : one;
#else
    const REAL log_part = log1pf(small), root = sqrtf((x > 0 ? x : REAL(0)) + log_part);
    const REAL half = expf(x / 2);
    const REAL ratio = small > 0 ? sqrtf(log_part / small) : one;
#endif
    return x < 0 ? half * ratio : root;  // the first form lasts until exp(x / 2) is 0
}

extern "C" __global__ void __launch_bounds__(128)
    route_rows(const REAL *__restrict__ logits, const REAL *__restrict__ bias,
               const unsigned char *__restrict__ token_mask, int num_tokens, int num_experts,
               int top_k, int score_fn, int by_logits, int among_chosen, int normalize,
               REAL eps, int eps_is_maximum, REAL factor, int policy, REAL *__restrict__ probs,
               int *__restrict__ ids, REAL *__restrict__ weights,
               unsigned char *__restrict__ valid, int *__restrict__ broken) {
    extern __shared__ unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64 t = (int64)blockIdx.x * 4 + warp;
    if (t >= num_tokens) return;
    REAL *scores = (REAL *)shared + warp * num_experts;  // the keys, but for the bias
    const REAL *x = logits + t * num_experts, infinity = REAL(1) / REAL(0);

    REAL top = -infinity;
    bool numbers = true;
    for (int e = lane; e < num_experts; e += 32) {
        numbers = numbers && x[e] == x[e];
        top = x[e] > top ? x[e] : top;
    }
    for (int step = 16; step > 0; step /= 2) {
        REAL other = __shfl_xor_sync(0xffffffffu, top, step);
        top = other > top ? other : top;
    }
    const bool masked = token_mask && !token_mask[t];
    const bool usable = __all_sync(0xffffffffu, numbers) && top > -infinity && top < infinity;
    if (lane == 0) valid[t] = !masked && usable;
    if (masked || !usable) {
#pragma unroll 1
        for (int e = lane; e < num_experts; e += 32) probs[t * num_experts + e] = 0;
#pragma unroll 1
        for (int k = lane; k < top_k; k += 32) {
            ids[t * top_k + k] = !masked && policy == CLAMP ? k : -1;
            weights[t * top_k + k] = 0;
        }
        if (lane == 0 && !masked && policy == RAISE) atomicExch(broken, 1);
        return;
    }

    REAL total = 0;
#pragma unroll 1
    for (int e = lane; e < num_experts; e += 32) {
        scores[e] = score(score_fn, x[e], top);
        total += scores[e];
    }
    total = warp_sum(total);
#pragma unroll 1
    for (int e = lane; e < num_experts; e += 32) {
        if (score_fn == SOFTMAX) scores[e] /= total;
        probs[t * num_experts + e] = scores[e];
    }
    __syncwarp();

    // The next choice is the largest key behind the last one, in the order (key down, expert up).
    REAL last_key = infinity, chosen_total = 0, chosen_top = -infinity;
    int last = -1;
#pragma unroll 1
    for (int k = 0; k < top_k; k++) {
        REAL best_key = 0;
        int best = -1;
#pragma unroll 1
        for (int e = lane; e < num_experts; e += 32) {
            REAL key = by_logits ? x[e] : scores[e];
            if (bias) key += bias[e];
            const bool after = key < last_key || (key == last_key && e > last);
            if (after && (best < 0 || key > best_key)) best = e, best_key = key;
        }
        for (int step = 16; step > 0; step /= 2) {
            const int e = __shfl_xor_sync(0xffffffffu, best, step);
            const REAL key = __shfl_xor_sync(0xffffffffu, best_key, step);
            const bool better = best < 0 || key > best_key || (key == best_key && e < best);
            if (e >= 0 && better) best = e, best_key = key;
        }
        last = best, last_key = best_key;
        REAL weight = 0;
        if (best < 0) {  // a key that is not a number: the bias's doing
            if (lane == 0) atomicExch(broken, 1);
        } else if (among_chosen) {
            chosen_top = x[best] > chosen_top ? x[best] : chosen_top;
            weight = x[best];  // for now
        } else {
            weight = scores[best];
            chosen_total += weight;
        }
        if (lane == 0) ids[t * top_k + k] = best, weights[t * top_k + k] = weight;
    }
    if (lane > 0) return;

    REAL *w = weights + t * top_k;
    if (among_chosen) {
        // Nothing was chosen, or only what can never be: no weight.
        const bool some = chosen_top > -infinity;
        REAL sum = 0;
#pragma unroll 1
        for (int k = 0; k < top_k; k++) {
            w[k] = some && ids[t * top_k + k] >= 0 ? exponential(w[k] - chosen_top) : REAL(0);
            sum += w[k];
        }
        chosen_total = 0;
#pragma unroll 1
        for (int k = 0; k < top_k; k++) {
            w[k] = some ? w[k] / sum : REAL(0);
            chosen_total += w[k];
        }
    }
    REAL divisor = 1;
    if (normalize) {
        divisor = eps_is_maximum ? (chosen_total > eps ? chosen_total : eps) : chosen_total + eps;
        if (!(divisor > 0)) divisor = 1;
    }
#pragma unroll 1
    for (int k = 0; k < top_k; k++) w[k] = w[k] / divisor * factor;
}
