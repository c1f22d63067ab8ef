"""Five pieces of craft on one small layer, each measured against doing without it.

Inputs come in eight kinds, and each kind has a linear map of its own to be learnt: a task on which
eight experts can specialise. The error is that of new inputs, relative to guessing 0; every line
is the mean of the seeds.

    python examples/12_router_craft.py --steps 300
"""

import argparse
from dataclasses import replace

import numpy as np

import npmoe
from npmoe.training import AdamW, AdamWConfig, ScheduleConfig, learning_rate, make_groups
from npmoe.training.schedules import router_noise
from npmoe.tree import flatten, unflatten

KINDS, SIZE, TOKENS = 8, 16, 256
CFG = npmoe.MoEConfig(
    hidden_size=SIZE, intermediate_size=16, num_experts=KINDS, top_k=2, renormalize=True
)
RATE = 1e-2


class Task:
    """Kinds of inputs around centres of their own, and a map for each."""

    def __init__(self, seed):
        rng = np.random.default_rng((seed, 0))
        self.centres = rng.standard_normal((KINDS, SIZE))
        self.maps = rng.standard_normal((KINDS, SIZE, SIZE)) / np.sqrt(SIZE)
        self.seed = seed

    def batch(self, step, outliers=0.0):
        """Return the inputs and targets of a step."""
        rng = np.random.default_rng((self.seed, 1, step))
        kinds = rng.integers(0, KINDS, TOKENS)
        x = self.centres[kinds] + 0.5 * rng.standard_normal((TOKENS, SIZE))
        y = np.einsum("tij,tj->ti", self.maps[kinds], x)
        wild = rng.random(TOKENS) < outliers
        y[wild] *= 100.0 * rng.standard_normal((wild.sum(), 1))
        return x.astype("float32"), y.astype("float32")


def train(seed, steps, *, params=None, outliers=0.0, noise=0.0, balance=0.01, **optimizer):
    """Return error, imbalance and unused experts after training.

    `noise` is (standard deviation, steps until it is gone).
    """
    task = Task(seed)
    std, fade = noise if noise else (0.0, 0)
    schedule = ScheduleConfig(
        steps=steps, learning_rate=RATE, router_noise_std=std, router_noise_steps=fade
    )
    settings = AdamWConfig(weight_decay=0.0, **({"grad_clip": None} | optimizer))
    flat, tree = flatten(npmoe.init_params(CFG, seed) if params is None else params)
    optimize = AdamW(flat, make_groups(tree, settings), settings)
    for step in range(steps):
        x, y = task.batch(step, outliers)
        cfg = replace(CFG, router_noise_std=router_noise(step, schedule))
        output, saved = npmoe.moe_forward(x, tree, cfg, rng=np.random.default_rng((seed, 2, step)))
        _, grad_router = npmoe.losses.load_balancing_loss(saved.routing, coefficient=balance)
        grads = npmoe.moe_backward(2 * (output - y) / y.size, saved, tree, grad_router)
        optimize.step(flatten(grads.params())[0], learning_rate(step, schedule))
    x, y = task.batch(10**6)
    output, saved = npmoe.moe_forward(x, unflatten(flat, tree), CFG)
    stats = saved.stats()
    error = float(((output - y) ** 2).mean() / (y**2).mean())
    return error, stats.max_violation, stats.dead_experts


def same_experts(seed):
    """Return initial parameters in which all experts are copies of the first."""
    params = npmoe.init_params(CFG, seed)
    for array in (params.gate_up_proj, params.down_proj):
        array[...] = array[0]
    return params


def collapsed_router(seed):
    """Return parameters whose router sends nearly everything to two experts."""
    params = npmoe.init_params(CFG, seed)
    centre = Task(seed).centres.mean(axis=0)
    params.router_weight[:2] += (8 * centre / (centre @ centre)).astype("float32")
    return params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    steps = options.steps
    half = max(1, steps // 2)
    experts, router = ("*_proj",), ("router_weight",)

    def show(title, ways):
        print(title)
        for name, arguments in ways.items():
            start = arguments.pop("start", None)
            found = np.array(
                [
                    train(s, steps, params=start(s) if start else None, **arguments)
                    for s in range(options.seeds)
                ]
            )
            error, imbalance, unused = found.mean(axis=0)
            print(
                f"  {name:34} error {error:7.4f}, imbalance {imbalance:5.2f}, "
                f"unused experts {unused:.1f}",
                flush=True,
            )

    show(
        "Per-expert initialisation",
        {
            "a stream for each expert": {},
            "all experts alike": {"start": same_experts},
            "all alike, no balancing loss": {"start": same_experts, "balance": 0.0},
        },
    )
    show(
        "What is trained",
        {
            "router and experts": {},
            "experts alone (router frozen)": {"frozen": router},
            "router alone (experts frozen)": {"frozen": experts},
        },
    )
    show(
        "Router noise, from a collapsed start without a balancing loss",
        {
            "none": {"start": collapsed_router, "balance": 0.0},
            "fading out over half of the run": {
                "start": collapsed_router,
                "balance": 0.0,
                "noise": (1.0, half),
            },
            "nearly constant": {
                "start": collapsed_router,
                "balance": 0.0,
                "noise": (1.0, 1000 * steps),
            },
        },
    )
    show(
        "Gradient clipping, one target in 500 wild",
        {
            "no clipping": {"outliers": 0.002},
            "global norm at most 1": {"outliers": 0.002, "grad_clip": 1.0},
            "global norm at most 0.1": {"outliers": 0.002, "grad_clip": 0.1},
        },
    )
    show(
        "Learning rate of the router",
        {f"times {f}": {"router_lr_factor": f} for f in (0.1, 1.0, 10.0)},
    )


if __name__ == "__main__":
    main()
