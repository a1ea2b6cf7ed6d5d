"""SmolLM3: Llama's layers, every fourth of them without positions."""

from megatron_ssu.models.families.parts import EDGES, PRE_NORM, epsilon, plain_mlp, pre_norm_layer
from megatron_ssu.models.family import Family

SMOLLM3 = Family(
    name="smollm3",
    model_types=("smollm3",),
    layer=PRE_NORM,
    edges=EDGES,
    settings=epsilon,
    layer_spec=pre_norm_layer,
    check=plain_mlp,
)
