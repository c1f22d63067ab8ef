// The activations of the experts: five curves v with limits, some infinite,
//     act = min(v(min(g, before)), after) * (clip(u, -clip, clip) + shift), or v(g) alone.
// The formulas are those of npmoe/activations.py.
#pragma once
#include "scalars.cuh"

enum { SILU, GELU, GELU_TANH, RELU, RELU2 };

struct Curve {
    int kind;
    REAL alpha, before, after, clip, shift;
};

struct Point {  // of a curve: its value and its slope
    REAL value, slope;
};

DEVICE REAL clipped(REAL x, REAL low, REAL high) {  // NaN stays NaN
    x = x < low ? low : x;
    return x > high ? high : x;
}

DEVICE REAL exponential(REAL x) {
#ifdef DOUBLE
    return exp(x);
#else
    return expf(x);
#endif
}

DEVICE REAL error_function(REAL x) {
#ifdef DOUBLE
    return erf(x);
#else
    return erff(x);
#endif
}

DEVICE Point evaluate(const Curve& c, REAL g) {
    const REAL one = 1, half = REAL(0.5), near = 40;  // beyond it a normal density is 0
    const REAL linear = REAL(1.5957691216057307), cubic = REAL(0.0713548162726009);  // 2 sqrt(2/pi)
    Point p;
    if (c.kind == SILU) {
        REAL z = g > c.before ? c.before : g;
        REAL below = one + exponential(-c.alpha * z), s = one / below;
        p.value = z / below;
        // In this order nothing cancels where s rounds to 1.
        p.slope = g > c.before ? REAL(0) : s + (one - s) * p.value * c.alpha;
    } else if (c.kind == GELU) {
        REAL share = half * (one + error_function(g * REAL(0.7071067811865476)));
        REAL z = clipped(g, -near, near);
        p.value = share * g;
        p.slope = share + z * REAL(0.3989422804014327) * exponential(-half * (z * z));
    } else if (c.kind == GELU_TANH) {
        REAL z = clipped(g, -near, near);
        REAL below = one + exponential(-z * (z * z * cubic + linear)), s = one / below;
        p.value = g / below;
        p.slope = s + (one - s) * p.value * (3 * cubic * (z * z) + linear);
    } else {
        REAL z = g <= 0 ? REAL(0) : g;
        p.value = c.kind == RELU ? z : z * z;
        p.slope = c.kind == RELU ? REAL(g > 0) : z + z;
    }
    return p;
}

DEVICE REAL activate(const Curve& c, REAL g) { return evaluate(c, g).value; }

DEVICE REAL activate(const Curve& c, REAL g, REAL u) {
    REAL value = evaluate(c, g).value;
    value = value > c.after ? c.after : value;
    return value * (clipped(u, -c.clip, c.clip) + c.shift);
}

// `act` again, and the gradients of both halves for the gradient `grad` of the activation.
struct Back {
    REAL act, grad_gate, grad_up;
};

DEVICE Back activate_back(const Curve& c, REAL g, REAL grad) {
    Point p = evaluate(c, g);
    return Back{p.value, grad * p.slope, REAL(0)};
}

DEVICE Back activate_back(const Curve& c, REAL g, REAL u, REAL grad) {
    Point p = evaluate(c, g);
    REAL value = p.value > c.after ? c.after : p.value;
    REAL slope = p.value > c.after ? REAL(0) : p.slope;
    REAL factor = clipped(u, -c.clip, c.clip) + c.shift;
    REAL inside = u <= c.clip && u >= -c.clip ? REAL(1) : REAL(0);
    return Back{value * factor, grad * (slope * factor), grad * value * inside};
}
