"""You changed a formula by hand. Is its backward right? Ask finite differences.

`gradcheck` compares a hand-written gradient with fourth-order central differences in float64,
element by element and along random directions, and raises GradientError where they disagree.
"""

import numpy as np

import npmoe


def leaky_swiglu(pre):
    """Your new activation: silu(g) * u, plus a small leak of the gate."""
    g, u = np.split(pre, 2, axis=-1)
    return g / (1 + np.exp(-g)) * u + 0.1 * g


def leaky_swiglu_backward(grad_act, pre):
    g, u = np.split(pre, 2, axis=-1)
    s = 1 / (1 + np.exp(-g))
    grad_g = grad_act * (u * s * (1 + g * (1 - s)) + 0.1)
    return np.concatenate([grad_g, grad_act * g * s], axis=-1)


def forgetful_backward(grad_act, pre):
    """Forget the leak: an easy mistake to make."""
    g, u = np.split(pre, 2, axis=-1)
    s = 1 / (1 + np.exp(-g))
    return np.concatenate([grad_act * u * s * (1 + g * (1 - s)), grad_act * g * s], axis=-1)


pre = np.random.default_rng(0).standard_normal((3, 8))
report = npmoe.gradcheck(leaky_swiglu, leaky_swiglu_backward, (pre,), names=("pre",))
print("right:", {name: f"{error:.1e}" for name, error in report.elementwise.items()})
try:
    npmoe.gradcheck(leaky_swiglu, forgetful_backward, (pre,), names=("pre",))
except npmoe.GradientError as error:
    print("wrong:", error)
else:
    raise SystemExit("the forgotten term was not noticed")
