"""The Mixture-of-Experts layer, forward and backward, composed once from a backend's verbs.

For token t, slot k, expert e = topk_ids[t, k] and kept routes r = (t, k)::

    x_t = router_logits[t] = W_r h_t + b_r                                             (1)
    topk_ids, w = route(x)                                                             (2)
    z_r = W1_e h_t + b1_e                        (gate_up, the only saved activation)  (3)
    a_r = act(z_r)                                                                     (4)
    y_t = sum over k of w_tk (W2_e a_r + b2_e)                                         (5)

Backward, with g_t = grad_output[t]::

    u_r = W2_e^T g_t                                 (unweighted gradient of a_r)      (6)
    grad_w_tk = <u_r, a_r> + <g_t, b2_e>                                               (7)
    grad_W2_e = sum over rows of e of (w_tk g_t) a_r^T;   grad_b2_e = sum w_tk g_t     (8)
    grad_z_r = act'(z_r) applied to w_tk u_r                                           (9)
    grad_W1_e = sum over rows of e of grad_z_r h_t^T;     grad_b1_e = sum grad_z_r     (10)
    grad_h_t = sum over k of W1_e^T grad_z_r + W_r^T grad_x_t                          (11)
    grad_p = (grad_w - <grad_w, w>/s) s/D  with w = s p / D, D the sum divided by      (12)
    grad_x_t = p (grad_p - <grad_p, p>) + grad_router_logits[t]                        (13)
    grad_W_r = sum over t of grad_x_t h_t^T;     grad_b_r = sum over t of grad_x_t     (14)

Equation (7) needs the dot product in the intermediate size only, so expert outputs are never
stored: Zhang et al. 2025, SonicMoE, give the same saved set (h, z, ids and weights).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from npmoe._checks import Axes, check_float, check_integer_ids, check_same_dtype
from npmoe._typing import Array
from npmoe.backends import Backend, FusedExperts, get_backend
from npmoe.capacity import expert_capacity
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.errors import RangeError, ShapeError
from npmoe.experts import compose_backward, compose_forward, target
from npmoe.params import MoEGrads, MoEParams, check_params, init_params
from npmoe.routing import Routing
from npmoe.stats import LoadStats, load_stats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedTensors:
    """What `moe_backward` needs; `gate_up` (R, 2I) is the only activation kept per route.

    Attributes
    ----------
    routing : Routing
        Ids, weights, probabilities and logits.
    plan : DispatchPlan
        Which row went where.
    hidden_states : (T, H) float array
        The input itself, not a copy: it must not change before the backward pass.
    """

    hidden_states: Array
    routing: Routing
    plan: DispatchPlan
    gate_up: Array
    shape: tuple[int, ...]
    cfg: MoEConfig
    backend: Backend

    def stats(self) -> LoadStats:
        """Return load and drops of this call, as host numbers."""
        return load_stats(self.routing, self.plan, self.cfg.num_experts, self.backend.asnumpy)


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
    """Run the layer; eq. (1) to (5) of this module.

    Parameters
    ----------
    hidden_states : (..., H) float array
        float32 or float64, of the backend's array type. Leading axes are flattened to T tokens;
        axis -2 is the sequence.
    params : MoEParams
        Arrays of the same dtype and array type.
    cfg : MoEConfig
        Which function to compute.
    backend : str, Backend or None
        As for `get_backend`.
    rng : numpy Generator, optional
        Source of the router noise; None means no noise.
    token_mask : (...,) bool array, optional
        True = valid. Masked rows may hold anything, are not counted and give exactly 0.
    topk_ids : (..., K) int array, optional
        Replayed choices (distinct within a token, -1 = none) instead of the router's; weights
        come from the current logits.
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
        If router logits are not finite (nan_policy "raise"), or replayed ids are out of range.
    BackendUnavailableError
        If the backend cannot run here.

    Notes
    -----
    **Cost**: 2*T*E*H + 2*R*H*(2I + I) flops for SwiGLU; each used expert is read once.
    **Accuracy**: gamma_H through the first, gamma_I through the second product and gamma_K in
    the sum, in the dtype of the input. **Order**: slots are summed in ascending order; bitwise
    reproducible for one BLAS and thread count.

    References
    ----------
    Shazeer et al. 2017, eq. 1; Jiang et al. 2024, "Mixtral of Experts", section 2.1.
    """
    name = "moe_forward"
    run = get_backend(backend)
    shape = _check_inputs(name, hidden_states, params, cfg)
    num_tokens = math.prod(shape[:-1])
    x = hidden_states.reshape(num_tokens, shape[-1])
    mask = _flat_mask(name, token_mask, shape)
    replay = None if topk_ids is None else _flat_ids(name, topk_ids, shape, cfg, run)

    router_input = x if mask is None else run.mask_rows(x, mask)
    router_logits = run.linear(router_input, params.router_weight, params.router_bias)  # eq. (1)
    routing = run.route(
        router_logits,
        cfg,
        token_mask=mask,
        topk_ids=replay,
        rng=rng,
        sequence_length=shape[-2],
    )  # eq. (2)
    num_valid = num_tokens
    if cfg.has_capacity and routing.token_mask is not None:
        num_valid = int(run.asnumpy(routing.token_mask).sum())
    plan = run.plan_dispatch(
        routing.topk_ids,
        num_experts=cfg.num_experts,
        capacity=expert_capacity(num_valid, cfg),
        drop_policy=cfg.drop_policy,
        topk_weights=routing.topk_weights,
    )
    if cfg.renormalize_drop == "after":
        weights = run.renormalize_kept(routing.topk_weights, plan, scale=cfg.routed_scaling_factor)
        routing = replace(routing, topk_weights=weights)
    forward = (
        run.experts_forward if isinstance(run, FusedExperts) else partial(compose_forward, run)
    )
    output, gate_up = forward(x, params, plan, routing.topk_weights, cfg)  # eq. (3) to (5)
    output = output.reshape(shape)
    if not save:
        return output, None
    return output, SavedTensors(
        hidden_states=x,
        routing=routing,
        plan=plan,
        gate_up=gate_up,
        shape=shape,
        cfg=cfg,
        backend=run,
    )


def moe_backward(
    grad_output: Array,
    saved: SavedTensors | None,
    params: MoEParams,
    grad_router_logits: Array | None = None,
    out: MoEParams | None = None,
    accumulate: bool = False,
) -> MoEGrads:
    """Return all gradients; eq. (6) to (14) of this module.

    Parameters
    ----------
    grad_output : (..., H) float array
        Gradient of the output.
    saved : SavedTensors
        From the forward pass; brings the config and the backend along.
    params : MoEParams
        The same values as in the forward pass.
    grad_router_logits : (T, E) float array, optional
        Gradient that auxiliary losses add to the router logits.
    out : MoEParams or MoEGrads, optional
        Arrays to write parameter gradients into, for example the result of the previous step.
        The gradient of hidden_states is always new.
    accumulate : bool
        Add to `out` instead of overwriting it; needs `out`.

    Returns
    -------
    MoEGrads
        New arrays, or those of `out`. Experts without rows get exactly zero (with `accumulate`:
        nothing is added).

    Raises
    ------
    ShapeError, DTypeError
        If a gradient does not fit the forward pass.
    RangeError
        For `accumulate` without `out`.

    Notes
    -----
    **Cost**: twice the forward's flops, and one activation recomputed per route.
    **Order**: as in the forward pass.
    """
    name = "moe_backward"
    if saved is None:
        raise RangeError(f"{name}: saved must come from a forward pass with save=True, got None.")
    run, cfg, plan, routing = saved.backend, saved.cfg, saved.plan, saved.routing
    check_params(name, params, cfg, saved.hidden_states.dtype, "hidden_states")
    _check_gradients(name, grad_output, saved, grad_router_logits)
    if accumulate and out is None:
        raise RangeError(f"{name}: accumulate must come with out, got out=None. Nothing to add to.")
    if out is not None:
        check_params(name, out, cfg, saved.hidden_states.dtype, "hidden_states", label="out")
    grad_tokens = grad_output.reshape(saved.hidden_states.shape)
    backward = (
        run.experts_backward if isinstance(run, FusedExperts) else partial(compose_backward, run)
    )
    experts = backward(
        grad_tokens,
        saved.hidden_states,
        saved.gate_up,
        params,
        plan,
        routing.topk_weights,
        cfg,
        out=out,
        accumulate=accumulate,
    )  # eq. (6) to (11)
    grad_logits = run.route_backward(experts.topk_weights, routing, cfg, plan)  # eq. (12), (13)
    if grad_router_logits is not None:
        grad_logits = run.add(grad_logits, grad_router_logits)
    router_input = saved.hidden_states
    if routing.token_mask is not None:
        router_input = run.mask_rows(router_input, routing.token_mask)
        grad_logits = run.mask_rows(grad_logits, routing.token_mask)
    grad_x, grad_router_weight, grad_router_bias = run.linear_backward(
        grad_logits, router_input, params.router_weight, params.router_bias
    )  # eq. (11), second half, and (14)
    grad_hidden = run.add(experts.hidden_states, grad_x)
    return MoEGrads(
        hidden_states=grad_hidden.reshape(saved.shape),
        router_weight=run.store(grad_router_weight, target(out, "router_weight"), accumulate),
        router_bias=None
        if grad_router_bias is None
        else run.store(grad_router_bias, target(out, "router_bias"), accumulate),
        gate_up_proj=experts.gate_up_proj,
        down_proj=experts.down_proj,
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
    )


def _check_inputs(
    name: str, hidden_states: Array, params: MoEParams, cfg: MoEConfig
) -> tuple[int, ...]:
    check_float(name, "hidden_states", hidden_states)
    shape = tuple(hidden_states.shape)
    if len(shape) < 2 or shape[-1] != cfg.hidden_size:
        raise ShapeError(
            f"{name}: hidden_states must have shape (..., H) = (..., {cfg.hidden_size}) with at "
            f"least two axes, got {shape}. H is bound by cfg."
        )
    check_params(name, params, cfg, hidden_states.dtype, "hidden_states")
    return shape


def _flat_mask(name: str, token_mask: Array | None, shape: tuple[int, ...]) -> Array | None:
    if token_mask is None:
        return None
    if str(getattr(token_mask, "dtype", None)) != "bool" or tuple(token_mask.shape) != shape[:-1]:
        raise ShapeError(
            f"{name}: token_mask must be a bool array of shape {shape[:-1]}, got "
            f"{getattr(token_mask, 'dtype', type(token_mask).__name__)} "
            f"{tuple(getattr(token_mask, 'shape', ()))}. True means valid."
        )
    return token_mask.reshape(math.prod(shape[:-1]))


def _flat_ids(
    name: str, topk_ids: Array, shape: tuple[int, ...], cfg: MoEConfig, run: Backend
) -> Array:
    check_integer_ids(name, "topk_ids", topk_ids)
    if tuple(topk_ids.shape[:-1]) != shape[:-1] or topk_ids.shape[-1] < 1:
        raise ShapeError(
            f"{name}: topk_ids must have shape (..., K) = {(*shape[:-1], cfg.top_k)}, got "
            f"{tuple(topk_ids.shape)}. The leading axes are bound by hidden_states {shape}."
        )
    flat = topk_ids.reshape(math.prod(shape[:-1]), topk_ids.shape[-1])
    host = run.asnumpy(flat)
    if host.size and not (host.min() >= -1 and host.max() < cfg.num_experts):
        raise RangeError(
            f"{name}: topk_ids must lie in -1..{cfg.num_experts - 1}, got "
            f"{int(host.min())}..{int(host.max())}. E is bound by cfg; -1 means no expert."
        )
    ordered = np.sort(host, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        raise RangeError(
            f"{name}: topk_ids must be distinct within a token, got "
            f"{host[repeated.any(axis=1)][0].tolist()}."
        )
    return flat


def _check_gradients(
    name: str, grad_output: Array, saved: SavedTensors, grad_router_logits: Array | None
) -> None:
    dtype: Any = saved.hidden_states.dtype
    check_float(name, "grad_output", grad_output)
    if tuple(grad_output.shape) != saved.shape:
        raise ShapeError(
            f"{name}: grad_output must have shape {saved.shape}, got {tuple(grad_output.shape)}. "
            "It is bound by the output of the forward pass."
        )
    check_same_dtype(name, "grad_output", grad_output, dtype, "hidden_states")
    if grad_router_logits is not None:
        axes = Axes(name)
        axes.bind("the forward pass", T=saved.hidden_states.shape[0], E=saved.cfg.num_experts)
        check_float(name, "grad_router_logits", grad_router_logits)
        axes.check("grad_router_logits", grad_router_logits, "T", "E")
        check_same_dtype(name, "grad_router_logits", grad_router_logits, dtype, "hidden_states")


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
