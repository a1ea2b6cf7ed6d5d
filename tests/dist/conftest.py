import re

import pytest

from tests.dist.ranks import Ranks, share_a_device

share_a_device()  # commands that tests run in their own process

# What `make test` leaves to `make test-rest`: further models, meshes and options of what it tries itself, and what guards
# none of the three promises. Regular expressions over FILE::TEST[PARAMETERS].
SLOW = [
    "test_(two_phases|context|checkpoint_memory|estimate|tools|real_data|scaling)::",
    r"test_drift::test_the_command_runs_under_torchrun",
    r"test_faults::test_a_loader_process",
    r"test_faults::test_a_full_disk.*\[(common|metadata)-|test_faults::test_a_full_disk.*True\]",
    r"test_faults::test_a_signal.*\[True\]",
    r"test_evaluate::test_a_runs_checkpoint|test_evaluate::.*\[(gemma3|qwen3-moe|olmo2-(TP1|DP2|TP2xPP2))",
    r"test_hub::test_offline",
    r"test_library::test_the_example\[TP2\]",
    r"test_malformed::test_ranks_end_alike\[checkpoint\]",
    r"test_models::.*\[(?!olmo2|bf16-olmo2|olmo2-bf16)",
    r"test_packing::test_weights_that_change_on_resume",
    r"test_phases::test_a_run_that_is_stopped.*\[mesh",
    r"test_resharding::test_a_run_resumes.*\[(?!row-PP2xVPP2|element-TP4)",
    r"test_resume::test_same_mesh.*\[(tp2|vpp-overlap)\]",
    r"test_resume::test_ranks_without_trainable_weights\[(all|rank)\]",
    r"test_scores::.*\[(llama|selective|infinite|overflow)\]",
    r"test_shield_mesh::.*(llama|trained|all|bf16)",
    r"test_shielded_training::test_an_empty_shield.*\[(fp32-False|fp32-True)\]",
    r"test_shielded_training::test_trainer_equals.*\[llama-tied\]",
    r"test_shielded_training::test_no_frozen_bit.*\[(column-ddp0|row)",
    r"test_compact::test_local_layers.*\[(PP2xVPP2\]|TP2)",
    r"test_compact::test_layers_with_a_store.*\[(TP1-|TP2\+SP-dense|TP2xPP2)",
    r"test_compact::test_padding.*element",
    r"test_adapters::test_training_follows.*\[(?!lora-TP2\+SP|dora-TP2xDP2|some-PP2xVPP2)",
    r"test_adapters::test_(merged|peft).*\[(?!dora\]|some)",
    r"test_adapters::test_adapters_resume.*\[(?!lora-bf16|dora-fp32)",
    r"test_adapters::test_merging.*\[(?!column-bf16|row-fp32)",
    r"test_adapters::test_a_run_trains.*\[(?!shielded)",
    r"test_methods::test_an_example_trains.*\[(?!(hft|gmt|lota|lora-ssu)-TP2).*-TP2xDP2\]",
    r"test_methods::test_an_example_does.*\[(?!(hft|gmt|lota|lora-ssu)\])",
    r"test_optimizers::.*\[(offloaded|precision-aware, fp16)",
    r"test_regularize::test_training_equals.*\[llama-tied",
    r"test_regularize::(test_one_alone|.*\[(TP2\+SP|fp32-TP2)\])",
    r"test_wholly_frozen::test_training_equals.*\[(?!layers-\]|first-stage-recompute|tied-embedding-TP2xPP2-\])",
    r"test_wholly_frozen::test_a_tensor_parallel.*\[(?!olmo2-\])",
    r"test_wholly_frozen::test_nothing_trains.*\[(?!PP2-recompute)",
]


@pytest.fixture(scope="session")
def ranks():
    return Ranks()


def pytest_collection_modifyitems(items):
    for item in items:
        name = item.nodeid.rpartition("/")[2].replace(".py::", "::")
        if item.nodeid.startswith("tests/dist/") and any(re.match(pattern, name) for pattern in SLOW):
            item.add_marker(pytest.mark.slow)
