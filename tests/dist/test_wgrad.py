"""Weight gradients of trainable columns only: the same trajectories as dense gradients, on every mesh and schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.dist import work
from tests.dist.test_shielded_training import OVERLAP, random_shield
from tests.dist.work import mesh
from tests.models import make_model

STEPS = 20
CASES = {
    "TP1": (1, mesh(), {}),
    "TP2+SP": (2, mesh(2, sequence=True), {}),
    "TP2xPP2xDP2": (8, mesh(2, 2), {"ddp": OVERLAP}),
    "PP2xVPP2": (2, mesh(1, 2, 2), {}),
    "TP2+SP, full recompute": (
        2,
        mesh(2, sequence=True),
        {"transformer": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}},
    ),
    "TP1, held": (1, mesh(), {"gradient": "held"}),
    "TP2+SP, held": (2, mesh(2, sequence=True), {"gradient": "held"}),
    "TP2xPP2xDP2, held, full recompute": (
        8,
        mesh(2, 2),
        {
            "gradient": "held",
            "ddp": OVERLAP,
            "transformer": {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        },
    ),
    "TP2, selective recompute": (
        2,
        mesh(2),
        {"transformer": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("olmo2", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def shield(model):
    return str(random_shield(model, model.parent / "shield.safetensors"))


@pytest.fixture(scope="module")
def dense(ranks, model, shield):
    """The trajectory of one rank that computes whole gradients, as every mesh's would be."""
    return ranks.run(work.train_steps, 1, str(model), mesh(), STEPS, shield_file=shield, gradient="dense")[0]["history"]


@pytest.mark.parametrize("case", CASES)
def test_trajectories_equal_the_dense_path(case, ranks, model, shield, dense):
    world, parallel, options = CASES[case]
    compact = ranks.run(work.train_steps, world, str(model), parallel, STEPS, shield_file=shield, **options)[0][
        "history"
    ]
    differences = np.abs(np.array(dense) - np.array(compact))
    assert differences[:, 0].max() < 1e-5  # loss
    assert np.allclose(np.array(dense)[:, 1], np.array(compact)[:, 1], rtol=1e-4)  # gradient norm


def layers_attached(model, shield_file):
    from megatron_ssu.session import open_session
    from megatron_ssu.shield.file import load_shield
    from megatron_ssu.shield.local import LocalShield
    from megatron_ssu.shield.wgrad import attach

    session = open_session(work.run_config(model, mesh(2)))
    return attach(session.chunks, LocalShield(load_shield(shield_file), session.layout))


def test_every_column_shielded_layer_takes_part_and_no_other(ranks, tmp_path):
    model = make_model("llama", tmp_path / "model")
    column = random_shield(model, tmp_path / "column.safetensors")
    element = random_shield(model, tmp_path / "element.safetensors", "element")
    assert ranks.run(layers_attached, 2, str(model), str(column)) == [16, 16]  # 4 layers of qkv, proj, fc1, fc2
    assert ranks.run(layers_attached, 2, str(model), str(element)) == [0, 0]


def test_gradient_of_a_fused_matrix_lands_in_its_rows_and_columns():
    from megatron_ssu.shield.wgrad import MatrixColumns

    torch.manual_seed(0)
    groups, block, first, rows, inputs = 3, 8, 2, 4, 16
    columns = torch.tensor([1, 5, 6, 15])
    grad_output, x = torch.randn(10, groups * block), torch.randn(10, inputs)
    main_grad = torch.randn(groups * block, inputs)
    expected = main_grad.clone()
    for group in range(groups):
        part = slice(group * block + first, group * block + first + rows)
        expected[part, columns] += (grad_output.t() @ x)[part][:, columns]
    MatrixColumns(groups, block, first, rows, columns).add_gradient(main_grad, grad_output, x)
    assert torch.allclose(main_grad, expected, atol=1e-5)
