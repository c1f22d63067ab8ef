"""The verbs of a backend, one by one: how to call each, what is right, and on what."""

from __future__ import annotations

import numpy as np

from npmoe.routing import SoftRouting
from npmoe.testing import activation_bounds, score_bounds
from npmoe.testing.conformance.verb_truths import (
    Verb,
    balls,
    cast_truth,
    draw_activation,
    draw_plan,
    draw_soft,
    dropout_truth,
    gate_backward_balls,
    identity_ids,
    linear,
    matrix,
    plan_of,
    plan_truth,
    run_activation,
    run_dropout,
    run_gather,
    run_plan,
    run_spread,
    run_store,
    run_wgrad,
    soft_route_backward_balls,
    soft_weights_truth,
    with_rows,
)

_SCALE = 0.75
_LIMIT = 2.0
# Of every verb but the routing ones, which `backend_cases` holds to the definition's router.
VERBS: dict[str, Verb] = {
    "linear": linear(
        lambda b, _, x, w, c: (b.linear(x, w, c), b.linear(x, w)),
        lambda d: matrix(d, (d.T, d.H), (d.I, d.H), (d.I,)),
    ),
    "linear_backward": linear(
        lambda b, _, g, x, w, c: (*b.linear_backward(g, x, w, c), *b.linear_backward(g, x, w)[:2]),
        lambda d: matrix(d, (d.T, d.I), (d.T, d.H), (d.I, d.H), (d.I,)),
    ),
    "mask_rows": linear(
        lambda b, _, x, m: (b.mask_rows(x, m),),
        lambda d: (d.config(), {"x": d.values(d.T, d.H), "mask": d.mask()}),
    ),
    "add": linear(lambda b, _, x, y: (b.add(x, y),), lambda d: matrix(d, (d.T, d.H), (d.T, d.H))),
    "multiply": linear(
        lambda b, _, x, y: (b.multiply(x, y),), lambda d: matrix(d, (d.T, d.H), (d.T, d.H))
    ),
    "scale": linear(lambda b, _, x: (b.scale(x, _SCALE),), lambda d: matrix(d, (d.T, d.H))),
    "cast": Verb(
        run=lambda b, _, x: (b.cast(x, "float32"), b.cast(x, "float64")),
        truth=cast_truth,
        draw=lambda d: matrix(d, (d.T, d.H)),
    ),
    "add_bias": linear(
        lambda b, _, x, c, m: (b.add_bias(x, c), b.add_bias(x, c, m)),
        lambda d: (
            d.config(),
            {"x": d.values(d.T, d.H), "bias": d.values(d.H), "mask": d.mask()},
        ),
    ),
    "sum_rows": linear(lambda b, _, x: (b.sum_rows(x),), lambda d: matrix(d, (d.T, d.H))),
    "gate_rows": Verb(
        run=lambda b, _, x, z: (b.gate_rows(x, z),),
        truth=balls(lambda _, x, z: (x * score_bounds.score(z, "sigmoid"),)),
        draw=lambda d: matrix(d, (d.T, d.H), (d.T, 1)),
    ),
    "gate_rows_backward": Verb(
        run=lambda b, _, g, a, z: (b.gate_rows_backward(g, a, z),),
        truth=balls(gate_backward_balls),
        draw=lambda d: matrix(d, (d.T, d.I), (d.T, d.I), (d.T, 1)),
    ),
    "store": linear(run_store, lambda d: matrix(d, (d.T, d.H), (d.T, d.H))),
    "plan_dispatch": Verb(run=run_plan, truth=plan_truth, draw=draw_plan),
    "softcap": Verb(
        run=lambda b, _, x: (b.softcap(x, _LIMIT),),
        truth=balls(lambda _, x: (score_bounds.softcap(x, _LIMIT),)),
        draw=lambda d: matrix(d, (d.T, d.E)),
    ),
    "softcap_backward": Verb(
        run=lambda b, _, g, x: (b.softcap_backward(g, x, _LIMIT),),
        truth=balls(lambda _, g, x: (g * score_bounds.softcap_slope(x, _LIMIT),)),
        draw=lambda d: (
            d.config(),
            {"grad": d.values(d.T, d.E), "capped": np.tanh(d.values(d.T, d.E))},
        ),
    ),
    "soft_dispatch": linear(
        lambda b, _, x, n: (b.soft_dispatch(x, n),), lambda d: (d.config(), draw_soft(d, "x", "n"))
    ),
    "soft_combine": linear(
        lambda b, _, y, n: (b.soft_combine(y, n),), lambda d: (d.config(), draw_soft(d, "y", "n"))
    ),
    "soft_combine_backward": linear(
        lambda b, _, g, y, n: b.soft_combine_backward(g, y, n),
        lambda d: (d.config(), draw_soft(d, "x", "y", "n")),
    ),
    "soft_dispatch_backward": linear(
        lambda b, _, g, x, n: b.soft_dispatch_backward(g, x, n),
        lambda d: (d.config(), draw_soft(d, "y", "x", "n")),
    ),
    "soft_weights_backward": Verb(
        run=lambda b, _, gd, gc, n, m: (
            b.soft_weights_backward(gd, gc, SoftRouting(router_logits=n, dispatch=n, combine=m)),
        ),
        truth=soft_weights_truth,
        draw=lambda d: (d.config(), draw_soft(d, "n", "n", "n", "n")),
    ),
    "soft_route_backward": Verb(
        run=lambda b, _, g, x, p, s: b.soft_route_backward(g, x, p, s),
        truth=balls(soft_route_backward_balls),
        draw=lambda d: (
            d.config(),
            draw_soft(d, "n", "x") | {"phi": d.values(d.E, d.H) + 3, "scale": d.values() + 3},
        ),
    ),
    "combine_identity": linear(
        lambda b, cfg, _, x, ids, w: (b.combine_identity(x, ids, w, cfg.num_experts),),
        identity_ids,
    ),
    "combine_identity_backward": linear(
        lambda b, cfg, g, x, ids, w: b.combine_identity_backward(g, x, ids, w, cfg.num_experts),
        identity_ids,
    ),
    "gather_rows": linear(
        run_gather,
        lambda d: (d.config(), {"x": d.values(d.T, d.H), "topk_ids": d.ids()}),
    ),
    "combine_rows": linear(
        lambda b, cfg, r, w, ids: (
            b.combine_rows(r, plan_of(b, cfg, ids), topk_weights=w),
            b.combine_rows(r, plan_of(b, cfg, ids)),
        ),
        lambda d: (d.config(), with_rows(d, d.H, weights=(d.T, d.K))),
    ),
    "scale_rows": linear(
        lambda b, cfg, r, w, ids: (b.scale_rows(r, plan_of(b, cfg, ids), w),),
        lambda d: (d.config(), with_rows(d, d.H, weights=(d.T, d.K))),
    ),
    "row_dot": linear(
        lambda b, cfg, r, s, ids: (b.row_dot(r, s, plan_of(b, cfg, ids)),),
        lambda d: (d.config(), with_rows(d, d.H, d.H)),
    ),
    "grouped_gemm": linear(
        lambda b, cfg, r, s, w, c, ids: (
            b.grouped_gemm(r, w, plan_of(b, cfg, ids)),
            b.grouped_gemm(r, w, plan_of(b, cfg, ids), bias=c),
            b.grouped_gemm(s, w, plan_of(b, cfg, ids), transposed=True),
        ),
        lambda d: (
            d.config(),
            with_rows(d, d.H, d.I, weight=(d.E, d.I, d.H), bias=(d.E, d.I)),
        ),
    ),
    "grouped_gemm_wgrad": linear(
        run_wgrad,
        lambda d: (d.config(), with_rows(d, d.H, d.I, into=(d.E, d.I, d.H))),
    ),
    "segment_sum": linear(
        lambda b, cfg, r, ids: (b.segment_sum(r, plan_of(b, cfg, ids)),),
        lambda d: (d.config(), with_rows(d, d.H)),
    ),
    "spread_experts": linear(
        run_spread,
        lambda d: (d.config(), {"values": d.values(d.E, d.H), "topk_ids": d.ids()}),
    ),
    "draw_dropout": Verb(
        run=run_dropout,
        truth=dropout_truth,
        draw=lambda d: (
            d.config(expert_dropout=0.5),
            {"topk_ids": d.ids(), "like": d.values(1)},
        ),
    ),
    "activation": Verb(
        run=run_activation,
        truth=balls(
            lambda cfg, z, g: (
                activation_bounds.activation(z, *cfg.activation_call()),
                activation_bounds.activation_backward(g, z, *cfg.activation_call()),
            )
        ),
        draw=draw_activation,
    ),
}
# Verbs that are held to the truth together with another one.
ALSO = {"activation": "activation_backward"}
