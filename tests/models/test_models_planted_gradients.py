"""A relative error of 0.1 % planted in any gradient of any hand-written backward is rejected.

The backwards are found by their names. One gradient of one of them is multiplied by 1.001
wherever the function is referenced, and the gradient check of a model or layer must report it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pkgutil
import sys
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

import npmoe
from npmoe import finite_differences, losses, nn, ops, routing
from npmoe.activations import bind_activation
from npmoe.backends import NumpyBackend
from npmoe.layer_gradcheck import gradcheck_layer, gradcheck_layers
from npmoe.models.gradcheck import gradcheck_model, gradcheck_models

TOLERANCE = 1e-7
ERROR = 1.001
ROOMS = (
    *("nn", "ops", "routing", "layer", "experts", "models"),
    *("routed_path", "soft_path", "shared_expert"),
)
USED_ACTIVATIONS = {name: bind_activation(name) for name in ("gelu", "relu", "swiglu")}
# Verbs that only the composed backward uses: adjoints without the suffix.
ADJOINT_VERBS = (ops.grouped_gemm_wgrad, ops.segment_sum, ops.row_dot, ops.scale_rows)
# The model turns pairs by a complex product; apply_rotary is public and planted by itself below.
# Images are data and need no gradient; the pair is checked in tests/nn.
NOT_REACHED = {
    "npmoe.nn.rotary.apply_rotary_backward",
    "npmoe.nn.images.split_patches_backward",
}
LEAST = {
    "npmoe.activations.ACTIVATIONS.gelu",
    "npmoe.activations.ACTIVATIONS.relu",
    "npmoe.activations.ACTIVATIONS.swiglu",
    "npmoe.backends.numpy_backend.NumpyBackend.experts_backward",
    "npmoe.experts.compose_backward",
    "npmoe.layer.moe_backward",
    "npmoe.losses.balance.load_balancing_loss",
    "npmoe.losses.per_token.z_loss",
    "npmoe.models.block._sublayer_backward",
    "npmoe.models.block.block_backward",
    "npmoe.models.block.feed_forward_backward",
    "npmoe.models.block.norm_backward",
    "npmoe.models.language.language_backward",
    "npmoe.models.stack.stack_backward",
    "npmoe.models.vision.vision_backward",
    "npmoe.nn.attention.causal_attention_backward",
    "npmoe.nn.cross_entropy.cross_entropy_backward",
    "npmoe.nn.dropout.dropout_backward",
    "npmoe.nn.embedding.embedding_backward",
    "npmoe.nn.attention.full_attention_backward",
    "npmoe.nn.images.mean_pool_backward",
    "npmoe.nn.linear.linear_backward",
    "npmoe.nn.mlp.mlp_backward",
    "npmoe.nn.multihead.multihead_attention_backward",
    "npmoe.nn.norm.layer_norm_backward",
    "npmoe.nn.norm.rms_norm_backward",
    "npmoe.nn.rotary.apply_rotary_backward",
    "npmoe.ops.activation_backward",
    "npmoe.ops.grouped_gemm_wgrad",
    "npmoe.ops.linear_backward",
    "npmoe.ops.row_dot",
    "npmoe.ops.scale_rows",
    "npmoe.ops.segment_sum",
    "npmoe.ops.combine_identity_backward",
    "npmoe.ops.gate_rows_backward",
    "npmoe.routed_path.routed_backward",
    "npmoe.routing.router.route_backward",
    "npmoe.routing.scoring.softcap_backward",
    "npmoe.routing.soft.soft_combine_backward",
    "npmoe.routing.soft.soft_dispatch_backward",
    "npmoe.routing.soft.soft_route_backward",
    "npmoe.routing.soft.soft_weights_backward",
    "npmoe.routing.weights.normalize_weights_backward",
    "npmoe.shared_expert.shared_backward",
    "npmoe.soft_path.soft_backward",
}


def found_backwards():
    """Return name -> function of every hand-written backward in the rooms of the model."""
    for info in pkgutil.walk_packages(npmoe.__path__, "npmoe."):
        if info.name.split(".")[1] in ROOMS:
            __import__(info.name)
    found = {}
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(tuple(f"npmoe.{room}" for room in ROOMS)):
            continue
        for name, value in vars(module).items():
            if inspect.isfunction(value) and name.endswith("_backward"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    for function in (*ADJOINT_VERBS, losses.load_balancing_loss, losses.z_loss):
        found[f"{function.__module__}.{function.__name__}"] = function
    found["npmoe.backends.numpy_backend.NumpyBackend.experts_backward"] = (
        NumpyBackend.experts_backward
    )
    # The models use these; each of all activations is planted by itself in test_activations.
    for name, entry in USED_ACTIVATIONS.items():
        found[f"npmoe.activations.ACTIVATIONS.{name}"] = entry.recompute_and_backward
    return found


FOUND = found_backwards()


def leaves(value):
    """Yield the float arrays of a result: an array, or nested tuples and dataclasses of them."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))


def gradients(name, result):
    """Return the gradients in a result: all of its arrays, but of a loss and activation the last.

    A loss returns its value first, an activation its own output again.
    """
    parts = list(leaves(result))
    return parts[-1:] if ".ACTIVATIONS." in name or ".losses." in name else parts


@contextmanager
def replaced(original, wrapper):
    """Put `wrapper` in every place of npmoe that refers to `original`."""
    undo = []

    def put(owner, name, value):
        undo.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "npmoe":
            continue
        for name, value in list(vars(module).items()):
            if value is original:
                put(module, name, wrapper)
            if inspect.isclass(value) and value.__module__ == module_name:
                for attribute, member in list(vars(value).items()):
                    if member is original:
                        put(value, attribute, wrapper)
                    elif isinstance(member, staticmethod) and member.__func__ is original:
                        put(value, attribute, staticmethod(wrapper))
    entries = [e for e in USED_ACTIVATIONS.values() if e.recompute_and_backward is original]
    for entry in entries:
        object.__setattr__(entry, "recompute_and_backward", wrapper)
    assert undo or entries
    try:
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
        for entry in entries:
            object.__setattr__(entry, "recompute_and_backward", original)


@contextmanager
def watched(name, spoil=None):
    """Count calls of one backward and how many gradients it returned; spoil one of them."""
    original = FOUND[name]
    seen = {"calls": 0, "gradients": 0}

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        parts = gradients(name, result)
        seen["gradients"] = max(seen["gradients"], len(parts))
        if spoil is not None and spoil < len(parts):
            seen["calls"] += 1
            # In place: some callers look at the arrays they gave in `out`, not at the result.
            np.multiply(parts[spoil], ERROR, out=parts[spoil])
        elif spoil is None:
            seen["calls"] += 1
        return result

    with replaced(original, wrapper):
        yield seen


MODELS = {**gradcheck_models(), **gradcheck_layers()}
CASES = [(title, backend) for backend in ("numpy", "reference") for title in MODELS]


def worst(title, backend):
    cfg = MODELS[title]
    check = gradcheck_layer if isinstance(cfg, npmoe.MoEConfig) else gradcheck_model
    values = list(check(cfg, directions=1, backend=backend).values())
    assert len(values) > 3
    return max(values, key=lambda e: (not e <= TOLERANCE, e))


@pytest.fixture(scope="module")
def differences():
    """Remember the numerical derivatives: no plant touches the forward pass that they measure."""
    known = {}
    measure = finite_differences._Probe._derivative

    def run(title, backend):
        def remembered(self, name, where, array, direction):
            key = (title, backend, name, where)
            if key not in known:
                known[key] = measure(self, name, where, array, direction)
            return known[key]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finite_differences._Probe, "_derivative", remembered)
            return worst(title, backend)

    return run


@pytest.fixture(scope="module")
def reached(differences):
    """Return name -> {case: number of gradients} from a run without any plant."""
    result = {}
    for name in FOUND:
        result[name] = {}
    for case in CASES:
        with ExitStack() as stack:
            seen = {n: stack.enter_context(watched(n)) for n in FOUND}
            error = differences(*case)
        assert error <= TOLERANCE, case
        for name, counts in seen.items():
            if counts["calls"]:
                result[name][case] = counts["gradients"]
    return result


def test_the_enumeration_finds_every_backward():
    assert set(FOUND) >= LEAST, LEAST - set(FOUND)


def test_every_backward_is_reached(reached):
    assert {name for name, cases in reached.items() if not cases} == NOT_REACHED


@pytest.mark.parametrize("name", sorted(set(FOUND) - NOT_REACHED))
def test_a_planted_error_is_rejected(name, reached, differences):
    """Each gradient in turn, in the first model that tells."""
    total = max(reached[name].values())
    assert total >= 1
    for number in range(total):
        calls = 0
        for case in (c for c, n in reached[name].items() if n > number):
            with watched(name, spoil=number) as seen:
                error = differences(*case)
            calls += seen["calls"]
            if not error <= TOLERANCE:
                break
        else:
            pytest.fail(f"gradient {number} of {name}: an error of 0.1 % went unnoticed")
        assert calls > 0


def test_without_remembered_differences_the_same_plant_is_rejected():
    with watched("npmoe.nn.norm.rms_norm_backward", spoil=0) as seen:
        assert not worst(CASES[0][0], "numpy") <= TOLERANCE
    assert seen["calls"] > 0


def test_the_plants_are_gone(differences):
    assert all(differences(*case) <= TOLERANCE for case in CASES)


def entropy(logits):
    cfg = npmoe.MoEConfig(hidden_size=1, intermediate_size=1, num_experts=4, top_k=2)
    return losses.entropy_loss(routing.route(logits, cfg), coefficient=0.7)


@pytest.mark.parametrize("factor", [1.0, ERROR])
def test_the_entropy_loss_by_itself(factor):
    def backward(grad, x):
        return grad * factor * entropy(x)[1]

    logits = np.random.default_rng(0).standard_normal((6, 4))
    if factor == 1.0:
        npmoe.gradcheck(lambda x: np.float64(entropy(x)[0]), backward, (logits,))
    else:
        with pytest.raises(npmoe.GradientError):
            npmoe.gradcheck(lambda x: np.float64(entropy(x)[0]), backward, (logits,))


@pytest.mark.parametrize("factor", [1.0, ERROR])
def test_the_public_rotary_by_itself(factor):
    cos, sin = nn.rotary_tables(0, 5, 4, dtype="float64")
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4))

    def backward(grad, x):
        return factor * nn.apply_rotary_backward(grad, cos, sin)

    if factor == 1.0:
        npmoe.gradcheck(lambda x: nn.apply_rotary(x, cos, sin), backward, (x,))
    else:
        with pytest.raises(npmoe.GradientError):
            npmoe.gradcheck(lambda x: nn.apply_rotary(x, cos, sin), backward, (x,))


def test_composed_and_fused_experts_are_both_planted(reached):
    """Each route of the expert core is reached by its own backend only."""
    fused = reached["npmoe.backends.numpy_backend.NumpyBackend.experts_backward"]
    composed = reached["npmoe.experts.compose_backward"]
    assert {backend for _, backend in fused} == {"numpy"}
    assert {backend for _, backend in composed} == {"reference"}
