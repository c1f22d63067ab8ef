"""Run one MoE layer forward and backward, and look at what the router decided."""

import numpy as np

import npmoe

cfg = npmoe.MoEConfig(
    hidden_size=16, intermediate_size=32, num_experts=4, top_k=2, renormalize=True
)
params = npmoe.init_params(cfg, rng=0)
hidden_states = np.random.default_rng(0).standard_normal((2, 6, 16)).astype(np.float32)

output, saved = npmoe.moe_forward(hidden_states, params, cfg)
print("output", output.shape, output.dtype)
print("experts of the first token", saved.routing.topk_ids[0])
print("weights of the first token", saved.routing.topk_weights[0].round(3))
print("rows per expert", saved.plan.tokens_per_expert)

# An auxiliary loss returns its value and its gradient; the gradient is passed in explicitly.
value, grad_router_logits = npmoe.losses.load_balancing_loss(saved.routing, coefficient=0.01)
grads = npmoe.moe_backward(
    np.ones_like(output), saved, params, grad_router_logits=grad_router_logits
)
print("load-balancing loss", round(value, 5))
print("gradient of the input", grads.hidden_states.shape)
print("gradient of the experts", grads.gate_up_proj.shape, grads.down_proj.shape)

# The same layer with room for four rows per expert: what does not fit contributes nothing.
tight = npmoe.MoEConfig(
    hidden_size=16,
    intermediate_size=32,
    num_experts=4,
    top_k=2,
    renormalize=True,
    expert_capacity=4,
    drop_policy="probability",
    renormalize_drop="after",
)
_, saved = npmoe.moe_forward(hidden_states, params, tight)
stats = saved.stats()
print(f"with capacity 4: {stats.dropped_routes} routes dropped ({stats.drop_rate:.0%})")
