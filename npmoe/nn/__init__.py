"""What a transformer needs around the Mixture-of-Experts layer, each as x and x_backward."""

from npmoe.nn.attention import (
    AttentionProbs,
    causal_attention,
    causal_attention_backward,
    full_attention,
    full_attention_backward,
)
from npmoe.nn.cross_entropy import cross_entropy, cross_entropy_backward
from npmoe.nn.dropout import dropout, dropout_backward
from npmoe.nn.embedding import embedding, embedding_backward
from npmoe.nn.images import (
    grid_positions,
    mean_pool,
    mean_pool_backward,
    split_patches,
    split_patches_backward,
)
from npmoe.nn.key_value_cache import KeyValueCache
from npmoe.nn.linear import linear, linear_backward
from npmoe.nn.mlp import MLPParams, init_mlp_params, mlp, mlp_backward
from npmoe.nn.multihead import (
    AttentionParams,
    SavedAttention,
    init_attention_params,
    multihead_attention,
    multihead_attention_backward,
)
from npmoe.nn.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from npmoe.nn.rotary import apply_rotary, apply_rotary_backward, rotary_tables
from npmoe.nn.verbs import ModelVerbs

__all__ = [
    "AttentionParams",
    "AttentionProbs",
    "KeyValueCache",
    "MLPParams",
    "ModelVerbs",
    "SavedAttention",
    "apply_rotary",
    "apply_rotary_backward",
    "causal_attention",
    "causal_attention_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "dropout",
    "dropout_backward",
    "embedding",
    "embedding_backward",
    "full_attention",
    "full_attention_backward",
    "grid_positions",
    "init_attention_params",
    "init_mlp_params",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "mean_pool",
    "mean_pool_backward",
    "mlp",
    "mlp_backward",
    "multihead_attention",
    "multihead_attention_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotary_tables",
    "split_patches",
    "split_patches_backward",
]
