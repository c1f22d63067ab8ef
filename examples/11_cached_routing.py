"""Cached routing: replay the choices of an input seen before, and time what that saves.

The output is the same bit for bit; what is saved is the choice alone, since the weights come from
the logits, which are computed as ever. It is worth something where choosing is a large part of
the layer: many experts, small ones, few tokens.

    python examples/11_cached_routing.py --rounds 30
"""

import argparse
import time
from functools import partial

import numpy as np

import npmoe
from npmoe.craft import RoutingCache
from npmoe.routing import route

LAYERS = {
    "8 experts, top-2 (Mixtral)": npmoe.preset(
        "mixtral", hidden_size=64, intermediate_size=128, num_experts=8, top_k=2
    ),
    "64 experts, top-8 of 4 in 8 groups": npmoe.preset(
        "deepseek_v3",
        hidden_size=64,
        intermediate_size=32,
        num_experts=64,
        top_k=8,
        num_groups=8,
        topk_group=4,
        shared_intermediate_size=32,
    ),
    "256 experts, top-8 of 4 in 8 groups": npmoe.preset(
        "deepseek_v3",
        hidden_size=64,
        intermediate_size=16,
        num_experts=256,
        top_k=8,
        num_groups=8,
        topk_group=4,
        shared_intermediate_size=16,
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1000, options.tokens)
    for name, cfg in LAYERS.items():
        params = npmoe.init_params(cfg)
        embedding = rng.standard_normal((1000, cfg.hidden_size)).astype(np.float32)
        hidden_states = embedding[prompt]
        cache = RoutingCache()
        cache.forward(hidden_states, params, cfg, input_ids=prompt)
        _, saved = npmoe.moe_forward(hidden_states, params, cfg)
        logits, ids = saved.routing.router_logits, saved.routing.topk_ids
        calls = {
            "choosing": partial(npmoe.moe_forward, hidden_states, params, cfg, save=False),
            "replaying": partial(cache.forward, hidden_states, params, cfg, input_ids=prompt),
            "router choosing": partial(route, logits, cfg, selection_bias=params.selection_bias),
            "router replaying": partial(route, logits, cfg, topk_ids=ids),
        }
        times = {what: [] for what in calls}
        for _ in range(options.rounds):  # in turn, so that all see the same machine
            results = {}
            for what, call in calls.items():
                start = time.perf_counter()
                results[what] = call()
                times[what].append(time.perf_counter() - start)
            if results["choosing"][0].tobytes() != results["replaying"].tobytes():
                raise SystemExit(f"{name}: a replay gave other bits")
        median = {what: 1000 * float(np.median(spent)) for what, spent in times.items()}
        less = {p: 1 - median[f"{p}replaying"] / median[f"{p}choosing"] for p in ("", "router ")}
        print(
            f"{name}: layer {median['choosing']:.2f} -> {median['replaying']:.2f} ms "
            f"({less['']:+.0%} saved), its routing {median['router choosing']:.2f} -> "
            f"{median['router replaying']:.2f} ms ({less['router ']:+.0%} saved), same bits "
            f"({cache.hits} hits)"
        )


if __name__ == "__main__":
    main()
