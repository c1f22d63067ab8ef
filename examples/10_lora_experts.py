"""Low-rank adapters on the experts: a trained model learns a new task, and forgets nothing.

A vision model reads upright digits; the new task is to read them lying on their side. Everything
is frozen but adapters of rank 4 on the experts (Hu et al. 2021). Beside it, all parameters are
trained for as long. Merged, the layer costs what it did; unmerged, the old bits are back.

    python examples/10_lora_experts.py --steps 300
"""

import argparse
from dataclasses import replace

import numpy as np
from _digits import DATA, fit, measure, pixels

from npmoe.craft import (
    AdapterBackend,
    attach_adapters,
    init_adapters,
    merge_adapters,
    merge_adapters_backward,
    unmerge_adapters,
)
from npmoe.models import init_vision_params, vision_forward, vision_loss
from npmoe.training import vision_recipe
from npmoe.tree import named_arrays, num_elements


def lying(images):
    return np.rot90(images, axes=(1, 2))


def with_experts(params, change):
    """Return the model with `change(layer, number)` in place of each MoE layer."""
    blocks = tuple(
        replace(block, feed_forward=change(block.feed_forward, number))
        for number, block in enumerate(params.blocks)
    )
    return replace(params, blocks=blocks)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=4)
    options = parser.parse_args()
    scale = 2.0
    config = vision_recipe(DATA, steps=options.before_steps, hidden_size=32, num_layers=2)
    model = config.model
    base = fit(
        init_vision_params(model, 0),
        config,
        lambda params, images, labels: vision_loss(images, labels, params, model).grads,
    )
    config = replace(vision_recipe(DATA, steps=options.steps, seed=1), model=model)

    def report(name, params, trained):
        upright, side = (measure(params, model, config, c)[0] for c in (lambda x: x, lying))
        print(f"{name:22} {trained:7,} trained: upright {upright:.2%}, lying {side:.2%}")

    report("base", base, 0)

    def merged(adapters):
        return with_experts(base, lambda layer, n: merge_adapters(layer, adapters[n], scale=scale))

    def compute_grads(adapters, images, labels):
        grads = vision_loss(lying(images), labels, merged(adapters), model).grads
        return tuple(
            merge_adapters_backward(block.feed_forward, one, scale=scale)
            for block, one in zip(grads.blocks, adapters, strict=True)
        )

    start = tuple(init_adapters(model.moe, options.rank, seed) for seed in range(model.num_layers))
    adapters = fit(start, config, compute_grads)
    adapted = merged(adapters)
    report("adapters of the experts", adapted, num_elements(adapters))
    everything = fit(
        base,
        config,
        lambda params, images, labels: vision_loss(lying(images), labels, params, model).grads,
    )
    report("all parameters", everything, num_elements(base))

    images = pixels(lying(DATA.test.images[:64]), config)
    attached = with_experts(base, lambda layer, n: attach_adapters(layer, adapters[n], scale=scale))
    one, _ = vision_forward(images, adapted, model)
    other, _ = vision_forward(images, attached, model, backend=AdapterBackend())
    difference = np.abs(one - other).max() / np.abs(one).max()
    print(f"merged and unmerged logits differ by {difference:.1e} of the largest")
    back = with_experts(
        adapted,
        lambda layer, n: unmerge_adapters(
            layer, base.blocks[n].feed_forward, adapters[n], scale=scale
        ),
    )
    same = all(
        a.tobytes() == b.tobytes()
        for (_, a), (_, b) in zip(named_arrays(back), named_arrays(base), strict=True)
    )
    print(f"after unmerging, every bit of the base is back: {same}")


if __name__ == "__main__":
    main()
