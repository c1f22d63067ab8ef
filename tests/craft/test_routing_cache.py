from __future__ import annotations

import numpy as np
import pytest

import npmoe
from npmoe import MoEConfig
from npmoe.craft import RoutingCache
from npmoe.errors import DTypeError, RangeError, ShapeError, UnsupportedError
from npmoe.params import init_params

SIZES = {"hidden_size": 6, "intermediate_size": 4, "num_experts": 8, "top_k": 3}
CASES = {
    "softmax": MoEConfig(**SIZES, renormalize=True),
    "groups, selection bias": MoEConfig(
        **SIZES, score_fn="sigmoid", selection_bias=True, num_groups=4, topk_group=2
    ),
    "capacity": MoEConfig(**SIZES, expert_capacity=2, drop_policy="batch_priority"),
    "expert choice": MoEConfig(**SIZES, routing="expert_choice", expert_capacity=3),
    "identity experts": MoEConfig(**SIZES, num_identity_experts=3),
}
IDS = np.arange(12).reshape(2, 6)


def layer(cfg):
    params = init_params(cfg, 0)
    if params.selection_bias is not None:
        params.selection_bias[...] = np.random.default_rng(1).standard_normal(8)
    return np.random.default_rng(0).standard_normal((2, 6, 6)).astype("float32"), params


@pytest.mark.parametrize("backend", ["numpy", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_a_replay_has_the_same_bits(name, backend):
    cfg = CASES[name]
    x, params = layer(cfg)
    want, _ = npmoe.moe_forward(x, params, cfg, backend)
    cache = RoutingCache()
    for _ in range(3):
        output = cache.forward(x, params, cfg, input_ids=IDS, backend=backend)
        assert output.tobytes() == want.tobytes()
    assert (cache.hits, cache.misses, len(cache)) == (2, 1, 1)


def test_a_replay_does_not_choose():
    cfg = CASES["softmax"]
    x, params = layer(cfg)
    cache = RoutingCache()
    cache.forward(x, params, cfg, input_ids=IDS)
    params.router_weight[...] *= -1
    chosen = npmoe.moe_forward(x, params, cfg)[0]
    replayed = cache.forward(x, params, cfg, input_ids=IDS)
    assert (chosen != replayed).any()
    cache.clear()
    assert len(cache) == 0
    assert cache.forward(x, params, cfg, input_ids=IDS).tobytes() == chosen.tobytes()


def test_everything_that_decides_is_in_the_key():
    cfg = CASES["softmax"]
    x, params = layer(cfg)
    cache = RoutingCache()
    cache.forward(x, params, cfg, input_ids=IDS)
    changed = IDS.copy()
    changed[1, 5] += 1
    cache.forward(x, params, cfg, input_ids=changed)
    cache.forward(x, params, cfg, input_ids=IDS, layer=1)
    cache.forward(x, params, cfg, input_ids=IDS.astype(np.int32))
    cache.forward(x, params, cfg, input_ids=IDS.reshape(-1))
    cache.forward(x, params, MoEConfig(**SIZES), input_ids=IDS)
    cache.forward(x, params, cfg, input_ids=IDS, backend="reference")
    assert (cache.hits, cache.misses) == (0, 7)
    cache.forward(x, params, cfg, input_ids=IDS[:, ::-1][:, ::-1])  # other strides
    assert cache.hits == 1


def test_the_oldest_entry_goes_first():
    cfg = CASES["softmax"]
    x, params = layer(cfg)
    cache = RoutingCache(max_entries=2)
    for layer_number in (0, 1, 0, 2, 0, 1):
        cache.forward(x, params, cfg, input_ids=IDS, layer=layer_number)
    # 0 was used after 1, so 2 pushed 1 out.
    assert (cache.hits, cache.misses, len(cache)) == (2, 4, 2)


def test_messages():
    cfg = CASES["softmax"]
    x, params = layer(cfg)
    with pytest.raises(RangeError, match=r"^RoutingCache: max_entries must be at least 1, got 0"):
        RoutingCache(0)
    cache = RoutingCache()
    with pytest.raises(DTypeError, match=r"input_ids must be an integer array, got float64"):
        cache.forward(x, params, cfg, input_ids=IDS / 2)
    with pytest.raises(UnsupportedError, match=r"cfg.routing must be .*, got 'dense'"):
        cache.forward(x, params, MoEConfig(routing="dense"), input_ids=IDS)
    for options in ({"second_expert_policy": "sampling", "top_k": 2}, {"drop_policy": "random"}):
        random = {"expert_capacity": 2} if "drop_policy" in options else {}
        with pytest.raises(UnsupportedError, match=r"must choose and drop without randomness"):
            cache.forward(x, params, MoEConfig(**(SIZES | options | random)), input_ids=IDS)
    cache.forward(x, params, cfg, input_ids=IDS)
    with pytest.raises(ShapeError, match=r"topk_ids must have shape"):
        cache.forward(x[:, :3], params, cfg, input_ids=IDS)
