"""What the examples on the handwritten digits share: a training loop and the measure."""

import numpy as np

from npmoe.training import (
    AdamW,
    evaluate_image_batch,
    image_batch,
    learning_rate,
    make_groups,
    uci_digits,
)
from npmoe.training.images import normalize_images
from npmoe.tree import flatten, unflatten

DATA = uci_digits()


def pixels(images, config):
    return normalize_images(images, config.channel_mean, config.channel_std)


def fit(params, config, compute_grads, data=DATA.train):
    """Train a copy of any tree of parameters with AdamW; return it.

    Batches depend on the config's seed and the data alone, so that two models see the same ones.
    """
    flat, tree = flatten(params)
    optimizer = AdamW(flat, make_groups(tree, config.optimizer), config.optimizer)
    for step in range(config.steps):
        images, labels = image_batch(
            data, config.batch_size, config.seed, step, max_shift=config.max_shift
        )
        grads = compute_grads(tree, pixels(images, config), labels)
        optimizer.step(flatten(grads)[0], learning_rate(step, config.schedule))
    return unflatten(flat, tree)


def measure(params, model, config, change=lambda images: images, data=DATA.test):
    """Return accuracy and loss, by default on the 359 test images."""
    images = pixels(change(data.images), config)
    found = evaluate_image_batch(params, model, images, data.labels)
    return float(np.trace(found.confusion)) / found.targets, found.nats / found.targets
