"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layers, stored with q, k and v in one tensor and gate and up in one."""

from megatron_ssu.models.families.parts import EDGES, PRE_NORM, epsilon, plain_mlp, pre_norm_layer
from megatron_ssu.models.family import Entry, Family

_QKV = "model.layers.{layer}.self_attn.qkv_proj.weight[q_proj,k_proj,v_proj]"
_GATE_UP = "model.layers.{layer}.mlp.gate_up_proj.weight[gate_proj,up_proj]"
_FUSED = {
    "self_attention.linear_qkv.weight": Entry(
        "self_attention.linear_qkv.weight", (_QKV,) * 3, ("q_proj", "k_proj", "v_proj"), split=0, form="qkv"
    ),
    "mlp.linear_fc1.weight": Entry(
        "mlp.linear_fc1.weight", (_GATE_UP,) * 2, ("gate_proj", "up_proj"), split=0, form="gated"
    ),
}

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    layer=tuple(_FUSED.get(entry.param, entry) for entry in PRE_NORM),
    edges=EDGES,
    settings=epsilon,
    layer_spec=pre_norm_layer,
    check=plain_mlp,
)
