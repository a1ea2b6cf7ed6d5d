"""Mistral 7B, Nemo and Small: Llama's layers; 7B v0.1 sees a window of tokens in all of them."""

from megatron_ssu.models.families.parts import EDGES, PRE_NORM, ROPE_BUFFERS, epsilon, plain_mlp, pre_norm_layer
from megatron_ssu.models.family import Family

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    layer=PRE_NORM,
    edges=EDGES,
    settings=epsilon,
    layer_spec=pre_norm_layer,
    check=plain_mlp,
    ignored=ROPE_BUFFERS,
)
