"""The Mixture-of-Experts layer, forward and backward, composed once from a backend's verbs.

For token t, slot k, expert e = topk_ids[t, k] and kept routes r = (t, k)::

    x_t = router_logits[t] = cap(W_r h_t + b_r) + noise                                (1)
    topk_ids, w = route(x)                                                             (2)
    z_r = W1_e h_t + b1_e                        (gate_up, the only saved activation)  (3)
    a_r = act(z_r)                                                                     (4)
    y_t = sum over k of w_tk (W2_e a_r + b2_e)       (identity experts: w_tk h_t)      (5)

Backward, with g_t = grad_output[t]::

    u_r = W2_e^T g_t                                 (unweighted gradient of a_r)      (6)
    grad_w_tk = <u_r, a_r> + <g_t, b2_e>                    (identity: <g_t, h_t>)     (7)
    grad_W2_e = sum over rows of e of (w_tk g_t) a_r^T;   grad_b2_e = sum w_tk g_t     (8)
    grad_z_r = act'(z_r) applied to w_tk u_r                                           (9)
    grad_W1_e = sum over rows of e of grad_z_r h_t^T;     grad_b1_e = sum grad_z_r     (10)
    grad_h_t = sum over k of W1_e^T grad_z_r + W_r^T grad_x_t                          (11)
    grad_v = s (grad_w - <grad_w, w>/s) / D      with w = s v / D, D the sum           (12)
    grad_x_t = score'(x_t) applied to grad_v + grad_router_logits[t]                   (13)
    grad_W_r = sum over t of cap'(x_t) grad_x_t h_t^T;  grad_b_r = sum cap' grad_x     (14)

The shared expert with gate s_t = sigmoid(<w_s, h_t>), and the output bias::

    y_t += s_t W2_s a_t + b_o   with a_t = act(W1_s h_t)     ((y + shared)/2 + b_o)    (15)
    u_t = s_t W2_s^T g_t;   grad_W2_s = sum s_t g_t a_t^T;   W1_s as in (9) to (11)    (16)
    grad of <w_s, h_t> = <u_t, a_t> (1 - s_t);               grad_b_o = sum g_t        (17)

Equation (7) needs the dot product in the intermediate size only, so expert outputs are never
stored: Zhang et al. 2025, SonicMoE, give the same saved set (h, z, ids and weights). Where the
weight sits before the experts, see `npmoe.experts`; soft routing, `npmoe.routing.soft`; other
norms D, `npmoe.routing.normalize_weights`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, overload

import numpy as np

from npmoe._layer_checks import (
    check_gradients,
    check_inputs,
    check_writable,
    flat_ids,
    flat_mask,
)
from npmoe._typing import Array
from npmoe.backends import Backend, get_backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.experts import target
from npmoe.params import MoEGrads, MoEParams, check_params, init_params
from npmoe.routed_path import routed_backward, routed_forward
from npmoe.saved import SavedTensors
from npmoe.shared_expert import shared_backward, shared_forward
from npmoe.soft_path import soft_backward, soft_forward


@overload
def moe_forward(
    hidden_states: Array,
    params: MoEParams,
    cfg: MoEConfig,
    backend: str | Backend | None = None,
    rng: np.random.Generator | None = None,
    token_mask: Array | None = None,
    topk_ids: Array | None = None,
    save: Literal[True] = True,
) -> tuple[Array, SavedTensors]: ...


@overload
def moe_forward(
    hidden_states: Array,
    params: MoEParams,
    cfg: MoEConfig,
    backend: str | Backend | None = None,
    rng: np.random.Generator | None = None,
    token_mask: Array | None = None,
    topk_ids: Array | None = None,
    save: bool = True,
) -> tuple[Array, SavedTensors | None]: ...


def moe_forward(
    hidden_states: Array,
    params: MoEParams,
    cfg: MoEConfig,
    backend: str | Backend | None = None,
    rng: np.random.Generator | None = None,
    token_mask: Array | None = None,
    topk_ids: Array | None = None,
    save: bool = True,
) -> tuple[Array, SavedTensors | None]:
    """Run the layer; eq. (1) to (5) and (15) of this module.

    Parameters
    ----------
    hidden_states : (..., H) float array
        float32 or float64, of the backend's array type. Leading axes are flattened to T tokens;
        axis -2 is the sequence.
    params : MoEParams
        Arrays of the same dtype and array type; beside float32, gate_up_proj and down_proj may
        be float16 or bfloat16.
    cfg : MoEConfig
        Which function to compute.
    backend : str, Backend or None
        As for `get_backend`.
    rng : numpy Generator, optional
        Source of everything random, drawn in the order: jitter, noise, second expert, drop,
        dropout. None means no jitter, noise or dropout; other random options then raise.
    token_mask : (...,) bool array, optional
        True = valid. Masked rows may hold anything, are not counted and give exactly 0.
    topk_ids : (..., K) int array, optional
        Replayed choices (distinct within a token, -1 = none) instead of the router's; weights
        come from the current logits. routing="hash" needs them.
    save : bool
        False returns None in place of the saved tensors.

    Returns
    -------
    output : (..., H) float array
        New. Routes over capacity contribute exactly 0; the residual is the caller's.
    saved : SavedTensors or None
        Holds references to `hidden_states`, not a copy.

    Raises
    ------
    ShapeError, DTypeError
        If arrays do not fit each other or `cfg`.
    RangeError
        If router logits are not finite (nan_policy "raise"), replayed ids are out of range, or
        a random option comes without a generator.
    BackendUnavailableError
        If the backend cannot run here.

    Notes
    -----
    **Cost**: 2*T*E*H + 2*R*H*(2I + I) flops for SwiGLU; each used expert is read once.
    **Accuracy**: gamma_H through the first, gamma_I through the second product and gamma_K in
    the sum, in the dtype of the input, whatever that of the expert weights. **Order**: slots are
    summed in ascending order; bitwise reproducible for one BLAS and thread count.

    References
    ----------
    Shazeer et al. 2017, eq. 1; Jiang et al. 2024, "Mixtral of Experts", section 2.1.
    """
    name = "moe_forward"
    run = get_backend(backend)
    shape = check_inputs(name, hidden_states, params, cfg)
    x = hidden_states.reshape(math.prod(shape[:-1]), shape[-1])
    mask = flat_mask(name, token_mask, shape)
    replay = flat_ids(name, topk_ids, shape, cfg, run)
    if cfg.routing == "soft":
        output, saved = soft_forward(run, x, params, cfg, shape=shape, token_mask=mask, rng=rng)
    else:
        output, saved = routed_forward(
            run, x, params, cfg, shape=shape, token_mask=mask, topk_ids=replay, rng=rng, save=save
        )
    valid = saved.routing.token_mask
    if cfg.shared_intermediate_size:  # eq. (15)
        shared_input = x if valid is None else run.mask_rows(x, valid)
        shared, pre = shared_forward(run, shared_input, params, cfg)
        output = run.add(output, shared)
        saved = replace(saved, shared_gate_up=pre)
    if cfg.shared_combine == "average":
        output = run.scale(output, 0.5)
    if params.output_bias is not None:
        output = run.add_bias(output, params.output_bias, valid)
    output = output.reshape(shape)
    return output, saved if save else None


def moe_backward(
    grad_output: Array,
    saved: SavedTensors | None,
    params: MoEParams,
    grad_router_logits: Array | None = None,
    out: MoEParams | None = None,
    accumulate: bool = False,
) -> MoEGrads:
    """Return all gradients; eq. (6) to (14), (16) and (17) of this module.

    Parameters
    ----------
    grad_output : (..., H) float array
        Gradient of the output.
    saved : SavedTensors
        From the forward pass; brings the config and the backend along.
    params : MoEParams
        The same values as in the forward pass.
    grad_router_logits : (T, N) float array, optional
        Gradient that auxiliary losses add to the router logits, in their dtype.
    out : MoEParams or MoEGrads, optional
        Arrays to write parameter gradients into, for example the result of the previous step,
        of the dtype of hidden_states. The gradient of hidden_states is always new.
    accumulate : bool
        Add to `out` instead of overwriting it; needs `out`.

    Returns
    -------
    MoEGrads
        New arrays, or those of `out`, of the dtype of hidden_states. Experts without rows get
        exactly zero (with `accumulate`: nothing is added).

    Raises
    ------
    ShapeError, DTypeError
        If a gradient does not fit the forward pass.
    RangeError
        For `accumulate` without `out`, or a read-only array in `out`.

    Notes
    -----
    **Cost**: twice the forward's flops, and one activation recomputed per route.
    **Order**: as in the forward pass.
    """
    name = "moe_backward"
    if saved is None:
        raise RangeError(f"{name}: saved must come from a forward pass with save=True, got None.")
    run, cfg, x = saved.backend, saved.cfg, saved.hidden_states
    check_params(name, params, cfg, x.dtype, "hidden_states")
    check_gradients(
        name, grad_output, saved.shape, saved.routing.router_logits, grad_router_logits, x.dtype
    )
    if accumulate and out is None:
        raise RangeError(f"{name}: accumulate must come with out, got out=None. Nothing to add to.")
    if out is not None:
        check_params(name, out, cfg, x.dtype, "hidden_states", label="out")
        check_writable(name, out)
    grad = grad_output.reshape(x.shape)
    valid = saved.routing.token_mask
    if valid is not None:
        grad = run.mask_rows(grad, valid)

    def keep(value: Array | None, field: str) -> Array | None:
        return None if value is None else run.store(value, target(out, field), accumulate)

    grad_output_bias = None
    if params.output_bias is not None:
        grad_output_bias = keep(run.sum_rows(grad), "output_bias")
    if cfg.shared_combine == "average":
        grad = run.scale(grad, 0.5)
    if saved.soft is not None:
        path = soft_backward(
            run, grad, saved, saved.soft, params, grad_router_logits, out=out, accumulate=accumulate
        )
    else:
        path = routed_backward(
            run, grad, saved, params, grad_router_logits, out=out, accumulate=accumulate
        )
    grad_hidden, shared = path.hidden_states, None
    if saved.shared_gate_up is not None:  # eq. (16), (17)
        shared_input = x if valid is None else run.mask_rows(x, valid)
        shared = shared_backward(run, grad, shared_input, saved.shared_gate_up, params, cfg)
        grad_hidden = run.add(grad_hidden, shared.hidden_states)
    return MoEGrads(
        hidden_states=grad_hidden.reshape(saved.shape),
        router_weight=keep(path.router_weight, "router_weight"),
        router_bias=keep(path.router_bias, "router_bias"),
        gate_up_proj=path.gate_up_proj,
        down_proj=path.down_proj,
        gate_up_bias=path.gate_up_bias,
        down_bias=path.down_bias,
        shared_gate_up_proj=keep(shared and shared.shared_gate_up_proj, "shared_gate_up_proj"),
        shared_down_proj=keep(shared and shared.shared_down_proj, "shared_down_proj"),
        shared_gate_weight=keep(shared and shared.shared_gate_weight, "shared_gate_weight"),
        output_bias=grad_output_bias,
        soft_scale=keep(path.soft_scale, "soft_scale"),
    )


class MoELayer:
    """Hold parameters and the last forward pass, for code that prefers objects.

    Parameters
    ----------
    cfg : MoEConfig
    params : MoEParams, optional
        Drawn with `init_params(cfg, rng, dtype)` if omitted.
    rng, dtype
        As for `init_params`.
    backend : str, Backend or None
        As for `get_backend`.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        params: MoEParams | None = None,
        *,
        rng: int | np.random.Generator = 0,
        dtype: str = "float32",
        backend: str | Backend | None = None,
    ) -> None:
        self.cfg = cfg
        self.params = init_params(cfg, rng, dtype) if params is None else params
        self.backend = backend
        self.saved: SavedTensors | None = None

    def __call__(
        self,
        hidden_states: Array,
        *,
        rng: np.random.Generator | None = None,
        token_mask: Array | None = None,
    ) -> Array:
        """Run `moe_forward` and keep what the backward pass needs."""
        output, self.saved = moe_forward(
            hidden_states, self.params, self.cfg, self.backend, rng, token_mask
        )
        return output

    def backward(self, grad_output: Array, grad_router_logits: Array | None = None) -> MoEGrads:
        """Run `moe_backward` for the last call."""
        if self.saved is None:
            raise RangeError("MoELayer.backward: a forward pass must come first, got none.")
        return moe_backward(grad_output, self.saved, self.params, grad_router_logits)
