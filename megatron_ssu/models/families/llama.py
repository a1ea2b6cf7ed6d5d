"""Llama 2 and 3, SmolLM2: norms before attention and MLP."""

from megatron_ssu.models.families.parts import EDGES, PRE_NORM, ROPE_BUFFERS, epsilon, plain_mlp, pre_norm_layer
from megatron_ssu.models.family import Family

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    layer=PRE_NORM,
    edges=EDGES,
    settings=epsilon,
    layer_spec=pre_norm_layer,
    check=plain_mlp,
    ignored=ROPE_BUFFERS,
)
