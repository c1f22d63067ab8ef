from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.training import AdamW, AdamWConfig, AdamWState, ParameterGroup, make_groups, optimizer
from npmoe.tree import flatten


@dataclass(frozen=True)
class Block:
    norm_weight: np.ndarray
    router_weight: np.ndarray
    router_bias: np.ndarray
    gate_up_proj: np.ndarray
    gate_up_bias: np.ndarray
    down_proj: np.ndarray
    head_bias: np.ndarray | None = None


@dataclass(frozen=True)
class Model:
    token_embedding: np.ndarray
    blocks: tuple[Block, ...]
    final_norm_weight: np.ndarray


def make_model(dtype="float32"):
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    block = Block(draw(4), draw(3, 4), draw(3), draw(3, 10, 4), draw(3, 10), draw(3, 4, 5))
    return Model(draw(7, 4), (block, block), draw(4))


def one_group(size, lr_factor=1.0, weight_decay=0.0):
    return (
        ParameterGroup(
            name="weight", start=0, stop=size, lr_factor=lr_factor, weight_decay=weight_decay
        ),
    )


def textbook_step(arrays, t, groups, config, learning_rate):
    """The definition: one number at a time, in double precision."""
    p, g, m, v = ([float(x) for x in array] for array in arrays)
    norm = math.sqrt(math.fsum(x * x for x in g))
    if config.grad_clip is not None and norm > config.grad_clip:
        g = [x * config.grad_clip / norm for x in g]
    for group in groups:
        rate = learning_rate * group.lr_factor
        for i in range(group.start, group.stop):
            m[i] = config.beta1 * m[i] + (1 - config.beta1) * g[i]
            v[i] = config.beta2 * v[i] + (1 - config.beta2) * g[i] ** 2
            m_hat = m[i] / (1 - config.beta1**t)
            v_hat = v[i] / (1 - config.beta2**t)
            p[i] -= rate * group.weight_decay * p[i]
            p[i] -= rate * m_hat / (math.sqrt(v_hat) + config.eps)
    return np.array(p), np.array(g), np.array(m), np.array(v)


@given(
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.integers(-12, 6),
    t=st.sampled_from([1, 2, 7, 100]),
    config=st.builds(
        AdamWConfig,
        beta1=st.sampled_from([0.0, 0.9]),
        grad_clip=st.sampled_from([None, 1.0, 0.03]),
        router_lr_factor=st.just(0.3),
    ),
)
def test_a_step_is_the_textbook_step(dtype, seed, scale, t, config):
    params = make_model(dtype)
    groups = make_groups(params, config)
    flat, _ = flatten(params)
    rng = np.random.default_rng(seed)
    g = (rng.standard_normal(flat.size) * 2.0**scale).astype(dtype)
    typical = min(2.0**scale, (config.grad_clip or math.inf) / math.sqrt(flat.size))
    m = (rng.standard_normal(flat.size) * typical).astype(dtype)
    v = (rng.random(flat.size) * typical**2).astype(dtype)
    adamw = AdamW(flat.copy(), groups, config)
    adamw.load_state(AdamWState(m=m, v=v, t=t - 1))
    adamw.step(g, 0.1)

    beta1, eps = config.beta1, config.eps
    p_ref, g_ref, m_ref, v_ref = textbook_step((flat, g, m, v), t, groups, config, 0.1)
    # First-order rounding errors, counted along the formulas; 1.01 covers the higher orders.
    # u: one rounding in the dtype. s: the scalars, computed in float64 here and there, with the
    # norm's sum of n squares.
    n = flat.size
    u, s = np.finfo(dtype).eps / 2, 2 * (n + 10) * np.finfo("float64").eps / 2
    err_m = (4 * u + s) * (beta1 * np.abs(m) + (1 - beta1) * np.abs(g_ref))
    rel_v = 9 * u + 2 * s
    den = np.sqrt(v_ref / (1 - config.beta2**t)) + eps
    rate = 0.1 * np.concatenate([np.full(x.stop - x.start, x.lr_factor) for x in groups])
    rate /= 1 - beta1**t
    err_update = rate / den * (err_m + np.abs(m_ref) * (rel_v / 2 + 7 * u + s))
    update = rate * np.abs(m_ref) / den
    bound_p = 1.01 * (3 * u * np.abs(flat) + err_update + (u + s) * (np.abs(flat) + update))
    for name, got, ref, bound in (
        ("m", adamw.m, m_ref, 1.01 * err_m),
        ("v", adamw.v, v_ref, 1.01 * rel_v * v_ref),
        ("p", adamw.params, p_ref, bound_p),
    ):
        worst = np.max(np.abs(got - ref) / bound)
        assert worst <= 1, (name, worst)
    assert np.max(bound_p) < 0.01 * np.max(update)
    assert np.max(err_m) < 0.01 * np.max(np.abs(m_ref))


def test_the_first_step_has_a_closed_form():
    p = np.array([2.0, -3.0, 5.0])
    g = np.array([0.25, -0.5, 0.0])
    adamw = AdamW(p.copy(), one_group(3, weight_decay=0.5), AdamWConfig(eps=1.0, grad_clip=None))
    assert adamw.step(g, 0.125) == math.sqrt(0.25**2 + 0.5**2)
    # m_hat = g and v_hat = g**2 whatever the betas are
    expected = p * (1 - 0.125 * 0.5) - 0.125 * g / (np.abs(g) + 1.0)
    np.testing.assert_array_max_ulp(adamw.params, expected, maxulp=8)


def test_clipping_is_by_the_global_norm():
    def step(g, clip):
        adamw = AdamW(np.zeros(2, "float32"), one_group(2), AdamWConfig(grad_clip=clip))
        return adamw.step(np.array(g, "float32"), 0.5), adamw

    norm, clipped = step([3, 4], 1.0)
    assert norm == 5.0
    # beyond the limit, the length of the gradient does not matter: powers of two are exact
    norm, longer = step([3 * 2**20, 4 * 2**20], 1.0)
    assert norm == 5.0 * 2**20
    for a, b in ((clipped.m, longer.m), (clipped.v, longer.v), (clipped.params, longer.params)):
        assert a.tobytes() == b.tobytes()
    np.testing.assert_array_max_ulp(clipped.m, np.array([0.06, 0.08], "float32"), maxulp=4)
    # at or below the limit nothing happens
    _, at_limit = step([3, 4], 5.0)
    _, free = step([3, 4], None)
    assert at_limit.m.tobytes() == free.m.tobytes()


def test_groups_follow_the_leaves():
    config = AdamWConfig(weight_decay=0.25, router_lr_factor=0.5)
    params = make_model()
    groups = make_groups(params, config)
    flat, _ = flatten(params)
    adamw = AdamW(flat, groups, config)
    options = {g.name: (g.stop - g.start, g.lr_factor, g.weight_decay) for g in groups}
    assert options["token_embedding"] == (28, 1.0, 0.0)
    assert options["blocks.0.norm_weight"] == (4, 1.0, 0.0)
    assert options["blocks.1.router_weight"] == (12, 0.5, 0.25)
    assert options["blocks.1.router_bias"] == (3, 0.5, 0.0)
    assert options["blocks.0.gate_up_proj"] == (120, 1.0, 0.25)
    assert options["blocks.0.gate_up_bias"] == (30, 1.0, 0.0)
    assert len(groups) == 14
    # neighbours with equal options share chunks: the embedding with the first norm, and
    # down_proj alone, the norms of block 1 ...
    runs = [(c.start, c.stop, c.lr_factor, c.weight_decay) for c in adamw._chunks]
    assert runs[:4] == [
        (0, 32, 1.0, 0.0),
        (32, 44, 0.5, 0.25),
        (44, 47, 0.5, 0.0),
        (47, 167, 1.0, 0.25),
    ]
    assert runs[-1][1] == flat.size
    assert len(runs) == 13


def test_only_matrices_decay():
    params = make_model()
    config = AdamWConfig(weight_decay=0.5)
    flat, tree = flatten(params)
    AdamW(flat, make_groups(params, config), config).step(np.zeros_like(flat), 0.5)
    for before, after in zip(params.blocks, tree.blocks, strict=True):
        for name in ("router_weight", "gate_up_proj", "down_proj"):
            np.testing.assert_array_equal(getattr(after, name), 0.75 * getattr(before, name))
        for name in ("norm_weight", "router_bias", "gate_up_bias"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    np.testing.assert_array_equal(tree.token_embedding, params.token_embedding)
    np.testing.assert_array_equal(tree.final_norm_weight, params.final_norm_weight)


def test_the_router_has_its_own_learning_rate():
    config = AdamWConfig(router_lr_factor=0.25)
    params = make_model()
    flat, _ = flatten(params)
    g = np.random.default_rng(0).standard_normal(flat.size).astype("float32")
    slow, plain, quarter = flat.copy(), flat.copy(), flat.copy()
    AdamW(slow, make_groups(params, config), config).step(g, 1e-2)
    same = replace(config, router_lr_factor=1.0)
    AdamW(plain, make_groups(params, same), same).step(g, 1e-2)
    AdamW(quarter, make_groups(params, same), same).step(g, 0.25e-2)
    router = np.zeros(flat.size, bool)
    for group in make_groups(params, config):
        router[group.start : group.stop] = "router" in group.name
    assert router.sum() == 30
    assert slow[router].tobytes() == quarter[router].tobytes()
    assert slow[~router].tobytes() == plain[~router].tobytes()
    assert not np.array_equal(slow[router], plain[router])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 129, 1000])
def test_chunks_do_not_change_a_bit(monkeypatch, size):
    config = AdamWConfig(grad_clip=0.5)
    cut = size // 3
    groups = (
        replace(one_group(cut, 0.5, 0.0)[0], name="a"),
        ParameterGroup(name="b", start=cut, stop=size, lr_factor=1.0, weight_decay=0.1),
    )

    def train(chunk_size, grads):
        monkeypatch.setattr(optimizer, "CHUNK_SIZE", chunk_size)
        p = np.random.default_rng(1).standard_normal(size).astype("float32")
        adamw = AdamW(p, groups, config)
        norms = [adamw.step(g, 1e-2) for g in grads]
        return norms, p.tobytes(), adamw.m.tobytes(), adamw.v.tobytes()

    rng = np.random.default_rng(2)
    # with integers the norm is exact in any order, so the chunk size cannot matter
    whole = [rng.integers(-9, 10, size).astype("float32") for _ in range(3)]
    assert train(64, whole) == train(size, whole)
    exact = math.sqrt(int(np.sum(whole[0].astype(int) ** 2)))
    assert train(64, whole)[0][0] == exact


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_changes_nothing_and_is_named(bad):
    params = make_model()
    config = AdamWConfig()
    groups = make_groups(params, config)
    flat, _ = flatten(params)
    adamw = AdamW(flat, groups, config)
    g = np.full(flat.size, 0.5, "float32")
    adamw.step(g, 1e-3)
    before = flat.tobytes(), adamw.m.tobytes(), adamw.v.tobytes()
    group = next(x for x in groups if x.name == "blocks.1.router_bias")
    g[group.stop - 1] = bad
    g[-1] = math.nan
    with pytest.raises(RangeError) as error:
        adamw.step(g, 1e-3)
    assert str(error.value) == (
        "AdamW.step: the gradient norm must be finite, got nan. First non-finite parameter: "
        "blocks.1.router_bias at step 2. Nothing was updated. "
        "Lower the learning rate, or look there."
    )
    assert (flat.tobytes(), adamw.m.tobytes(), adamw.v.tobytes()) == before
    assert adamw.t == 1


def test_an_infinite_gradient_says_inf():
    adamw = AdamW(np.zeros(3, "float32"), one_group(3), AdamWConfig())
    with pytest.raises(RangeError, match=r"must be finite, got inf\. First .*: weight at step 1"):
        adamw.step(np.array([0, -math.inf, 1], "float32"), 1e-3)


@pytest.mark.parametrize(
    ("dtype", "value", "limit"), [("float32", 1e20, "1.8e\\+19"), ("float64", 1e200, "1.3e\\+154")]
)
def test_a_gradient_whose_square_overflows_is_refused(dtype, value, limit):
    groups = (
        replace(one_group(2)[0], name="small"),
        ParameterGroup(name="empty", start=2, stop=2, lr_factor=1.0, weight_decay=0.0),
        ParameterGroup(name="large", start=2, stop=4, lr_factor=1.0, weight_decay=0.0),
    )
    p = np.ones(4, dtype)
    adamw = AdamW(p, groups, AdamWConfig())
    with pytest.raises(
        RangeError,
        match=rf"the gradient norm must be at most {limit}, so that its square fits {dtype}, "
        r"got (1e\+20|inf)\. Largest gradient: large at step 1\. Nothing was updated",
    ):
        adamw.step(np.array([1, 1, 1, -value], dtype), 1e-3)
    assert adamw.t == 0
    assert (p == 1).all()


def test_denormal_moments_become_zero():
    p = np.ones(3, "float32")
    adamw = AdamW(p, one_group(3), AdamWConfig())
    m = np.array([1e-40, -1e-40, 1e-30], "float32")
    adamw.load_state(AdamWState(m=m, v=np.abs(m), t=14))
    zero = np.zeros(3, "float32")
    adamw.step(zero, 1e-3)
    assert adamw.m[0] != 0
    adamw.step(zero, 1e-3)
    assert adamw.t == optimizer.FLUSH_EVERY
    assert (adamw.m[:2] == 0).all()
    assert (adamw.v[:2] == 0).all()
    np.testing.assert_array_max_ulp(adamw.m[2:], np.array([0.81e-30], "float32"), maxulp=4)
    np.testing.assert_array_max_ulp(adamw.v[2:], np.array([0.9025e-30], "float32"), maxulp=4)
    assert (p == 1).all()


def test_a_saved_state_continues_bitwise():
    rng = np.random.default_rng(5)
    grads = rng.standard_normal((40, 9)).astype("float32")
    config = AdamWConfig()

    def start():
        return AdamW(np.ones(9, "float32"), one_group(9, 1.0, 0.1), config)

    straight = start()
    for g in grads:
        straight.step(g, 1e-2)
    first = start()
    for g in grads[:15]:
        first.step(g, 1e-2)
    saved = first.state()
    second = AdamW(first.params.copy(), first.groups, config)
    second.load_state(AdamWState(m=saved.m.copy(), v=saved.v.copy(), t=saved.t))
    for g in grads[15:]:
        second.step(g, 1e-2)
    assert second.t == straight.t == 40
    for name in ("params", "m", "v"):
        assert getattr(second, name).tobytes() == getattr(straight, name).tobytes()


def test_a_step_leaves_the_gradient_alone_and_raises_no_float_error():
    g = np.array([1e-30, 0, 3, -4], "float32")
    g.flags.writeable = False
    p = np.ones(4, "float32")
    with np.errstate(all="raise"):
        AdamW(p, one_group(4), AdamWConfig()).step(g, 1e-3)
    np.testing.assert_array_equal(g, np.array([1e-30, 0, 3, -4], "float32"))
    assert np.isfinite(p).all()


def test_no_parameters_are_no_error():
    adamw = AdamW(np.zeros(0, "float32"), (), AdamWConfig())
    assert adamw.step(np.zeros(0, "float32"), 1e-3) == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta1": 1.0}, "AdamWConfig: beta1 must be in [0, 1), got 1.0."),
        ({"beta2": -0.1}, "AdamWConfig: beta2 must be in [0, 1), got -0.1."),
        ({"eps": 0.0}, "AdamWConfig: eps must be positive and finite, got 0.0."),
        (
            {"grad_clip": 0},
            "AdamWConfig: grad_clip must be positive and finite, got 0. None turns clipping off.",
        ),
        (
            {"weight_decay": math.nan},
            "AdamWConfig: weight_decay must be finite and not negative, got nan.",
        ),
        (
            {"router_lr_factor": -1},
            "AdamWConfig: router_lr_factor must be finite and not negative, got -1.",
        ),
    ],
)
def test_config_messages(values, message):
    with pytest.raises(RangeError) as error:
        AdamWConfig(**values)
    assert str(error.value) == message


def test_constructor_messages():
    p, config = np.zeros(4, "float32"), AdamWConfig()
    with pytest.raises(RangeError, match=r"groups must cover flat_params \(4,\), got an end at 3"):
        AdamW(p, one_group(3), config)
    gap = (*one_group(2), replace(one_group(4)[0], name="late", start=3))
    with pytest.raises(RangeError, match=r"groups must be adjacent, got late = 3:4 after 2"):
        AdamW(p, gap, config)
    with pytest.raises(RangeError, match=r"eps must be at least 5\.3e-38 for float32, got 1e-40"):
        AdamW(p, one_group(4), AdamWConfig(eps=1e-40))
    with pytest.raises(DTypeError, match="AdamW: flat_params must have dtype"):
        AdamW(np.zeros(4, int), one_group(4), config)
    with pytest.raises(ShapeError, match="AdamW: flat_params must have shape"):
        AdamW(np.zeros((2, 2)), one_group(4), config)


def test_argument_messages():
    adamw = AdamW(np.zeros(4, "float32"), one_group(4), AdamWConfig())
    with pytest.raises(
        ShapeError, match=r"AdamW.step: flat_grads must have shape \(N,\) = \(4,\), got \(5,\)"
    ):
        adamw.step(np.zeros(5, "float32"), 1e-3)
    with pytest.raises(DTypeError, match="flat_grads must have dtype float32, got float64"):
        adamw.step(np.zeros(4), 1e-3)
    for rate in (-1e-3, math.nan):
        with pytest.raises(RangeError, match="learning_rate must be finite and not negative"):
            adamw.step(np.zeros(4, "float32"), rate)
    good, other = np.ones(4, "float32"), np.ones(3, "float32")
    with pytest.raises(ShapeError, match=r"AdamW.load_state: v must have shape \(N,\) = \(4,\)"):
        adamw.load_state(AdamWState(m=good, v=other, t=1))
    with pytest.raises(DTypeError, match=r"AdamW.load_state: m must have dtype float32"):
        adamw.load_state(AdamWState(m=good.astype("float64"), v=good, t=1))
    with pytest.raises(RangeError, match=r"AdamW.load_state: t must not be negative, got -1"):
        adamw.load_state(AdamWState(m=good, v=good, t=-1))
    assert not adamw.m.any()


def test_a_pattern_that_freezes_nothing_is_refused():
    with pytest.raises(
        RangeError,
        match=r"^make_groups: frozen must match parameters, got '\*\.gate', which matches none\. "
        r"The first of 14 is 'token_embedding'\.$",
    ):
        make_groups(make_model(), AdamWConfig(frozen=("*router*", "*.gate")))
    for wrong in ("*router*", (3,)):
        with pytest.raises(RangeError, match=r"^AdamWConfig: frozen must be a tuple of patterns"):
            AdamWConfig(frozen=wrong)
    assert AdamWConfig(frozen=["*"]) == AdamWConfig(frozen=("*",))


def test_frozen_slices_keep_their_bits_and_hide_what_is_not_finite():
    flat, model = flatten(make_model())
    config = AdamWConfig(frozen=("blocks.0.*",))
    groups = make_groups(model, config)
    assert [g.frozen for g in groups] == [g.name.startswith("blocks.0.") for g in groups]
    run = AdamW(flat, groups, config)
    before = flat.copy()
    grads = np.ones_like(flat)
    still = np.zeros(flat.size, bool)
    for group in groups:
        still[group.start : group.stop] = group.frozen
    grads[still] = np.nan
    norm = run.step(grads, 0.1)
    assert norm == math.sqrt((~still).sum())
    assert np.array_equal(flat[still], before[still])
    assert (flat[~still] != before[~still]).all()
    assert not run.m[still].any()
    grads[~still] = np.inf
    with pytest.raises(RangeError, match="First non-finite parameter: token_embedding"):
        run.step(grads, 0.1)
