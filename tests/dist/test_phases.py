"""Runs with phases: each starts from the model before, under its own method; the same on any mesh and after any stop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_ssu.shield.shield_file import load_shield
from megatron_ssu.shield.verify import verify
from megatron_ssu.train.storage import DistCheckpointing
from tests.dist import phases_work as work
from tests.dist.ranks import RankError
from tests.dist.test_methods import make_world

CHATS = "world/chat.jsonl"
MESHES = {"TP1": (1, []), "TP2xDP2": (4, ["parallel.tensor_model_parallel_size=2"])}
RUN = {
    "model": {"path": "hf/source"},
    "precision": {"dtype": "fp32"},
    "shield": {"ratio": 0.5, "calibration": {"path": "world/chat.jsonl", "samples": 40, "sequence_length": 64}},
    "data": {
        **{"sequence_length": 32, "loader_workers": 0},
        **{"source_valid": "world/source_valid.jsonl", "target_valid": "world/target_valid.jsonl"},
    },
    "train": {
        **{"iterations": 3, "micro_batch_size": 2, "global_batch_size": 8, "eval_interval": 0, "eval_batches": 1},
        "optimizer": {"lr": 1e-3},
    },
    "log": {"interval": 2, "tensorboard": False},
    "phases": [
        {"name": "english", "method": {"name": "none"}, "data": {"train": "world/chat.jsonl"}},
        {
            **{"name": "first", "data": {"train": "world/target_train.jsonl"}, "train": {"iterations": 4}},
            "shield": {"ratio": 0.75},
        },
        {
            **{"name": "changed", "method": {"name": "layers", "layers": {"choose": "changed", "before": "phase:start"}}},
            "data": {"train": "world/source_train.jsonl", "sequence_length": 16},
        },
        {
            **{"name": "second", "data": {"train": "world/source_train.jsonl"}},
            "shield": {"ratio": 0.75, "reserve": ["phase:first"]},
        },
        {
            **{"name": "same", "data": {"train": "world/target_train.jsonl"}, "shield": {"file": "phase:second"}},
            "optimizer": "kept",
        },
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("phases"))


def write(world, name, **changes):
    """A run file of that name, which writes to runs/NAME."""
    run = RUN | {"checkpoint": {"directory": f"runs/{name}", "interval": 2}} | changes
    (world / f"{name}.yaml").write_text(yaml.safe_dump(run))
    return str(world / f"{name}.yaml")


@pytest.fixture(scope="module")
def done(ranks, world):
    """Runs the five phases at one go, or stopped; once per name."""
    found = {}

    def run(name, mesh="TP1", stops=()):
        if name not in found:
            size, overrides = MESHES[mesh]
            found[name] = ranks.run(work.phases, size, write(world, name), str(world), overrides, list(stops))[0]
        return found[name]

    return run


def model(world, name, phase):
    return load_file(world / "runs" / name / "phases" / phase / "model" / "model.safetensors")


PHASES = ("1-english", "2-first", "3-changed", "4-second", "5-same")


def test_every_phase_is_trained_and_shown(done, world):
    result = done("straight")
    assert result["iterations"] == [3, 4, 3, 3, 3]
    rows = result["table"]
    assert [row["phase"] for row in rows] == ["start", "english", "first", "changed", "second", "same"]
    assert all(set(row["losses"]) == {"source_valid_loss", "target_valid_loss"} for row in rows)
    assert "phase 2 of 5: first" in result["said"] and "after phase" in result["said"]


@pytest.mark.parametrize(
    ("name", "mesh", "stops"), [("stopped", "TP1", (2, 2, 1, 4)), ("mesh-stopped", "TP2xDP2", (5, 3))]
)
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bits(done, world, name, mesh, stops):
    straight = "straight" if mesh == "TP1" else "mesh"
    done(straight, mesh)
    result = done(name, mesh, stops)
    assert "resuming after iteration" in result["said"]
    for phase in PHASES:
        one, other = model(world, straight, phase), model(world, name, phase)
        assert all(torch.equal(one[key], other[key]) for key in one), phase


def test_the_mesh_does_not_matter(done, world):
    rows, others = done("straight")["table"], done("mesh", "TP2xDP2")["table"]
    for row, other in zip(rows, others, strict=True):
        for key, loss in row["losses"].items():
            assert other["losses"][key] == pytest.approx(loss, rel=2e-3)  # exports are bf16: rounding moves a last bit


@pytest.mark.parametrize(("name", "mesh"), [("straight", "TP1"), ("mesh", "TP2xDP2")])
def test_no_frozen_bit_moves_in_any_phase(done, world, name, mesh):
    done(name, mesh)
    before = world / "hf" / "source"
    for phase in PHASES:
        folder = world / "runs" / name / "phases" / phase
        if phase not in ("1-english", "5-same"):
            report = verify(before, folder / "model", folder / "shield.safetensors")
            assert report.ok, (phase, report.verdict)
        before = folder / "model"
    given = world / "runs" / name / "phases" / "5-same"
    report = verify(
        world / "runs" / name / "phases" / "4-second" / "model", given / "model", given / "given-shield.safetensors"
    )
    assert report.ok


def test_reserved_columns_stay(done, world):
    done("straight")
    folder = world / "runs" / "straight" / "phases"
    first, second = (load_shield(folder / name / "shield.safetensors") for name in ("2-first", "4-second"))
    before, after = (model(world, "straight", name) for name in ("3-changed", "4-second"))
    linear = [name for name, matrix in second.matrices.items() if matrix.scored]
    trained = 0
    for name in linear:
        mine, theirs = ~second.masks[name].columns(), ~first.masks[name].columns()
        assert not (mine & theirs).any()
        assert second.masks[name].frozen_units == int(0.75 * mine.size), "reserved columns count in the ratio"
        assert torch.equal(before[name][:, torch.from_numpy(theirs)], after[name][:, torch.from_numpy(theirs)])
        trained += int(mine.sum())
    assert trained > 0


def test_layers_that_changed_most_are_frozen(done, world):
    done("straight")
    shield = load_shield(world / "runs" / "straight" / "phases" / "3-changed" / "shield.safetensors")
    start, now = load_file(world / "hf" / "source" / "model.safetensors"), model(world, "straight", "2-first")
    linear = [matrix for matrix in shield.matrices.values() if matrix.scored]
    relative = {
        m.name: float((now[m.name].float() - start[m.name].float()).norm() / start[m.name].float().norm())
        for m in linear
    }
    by_kind = {kind: np.mean([relative[m.name] for m in linear if m.kind == kind]) for kind in {m.kind for m in linear}}
    score = {}
    for m in linear:
        score.setdefault(m.layer, []).append(relative[m.name] / by_kind[m.kind])
    ranked = sorted(score, key=lambda layer: -np.mean(score[layer]))
    frozen = {m.layer for m in linear if shield.masks[m.name].frozen_units}
    assert frozen == set(ranked[: len(ranked) // 2])


def test_a_kept_optimizer_continues(done, world):
    done("straight")

    def steps(phase, iteration):
        folder = world / "runs" / "straight" / "phases" / phase / "checkpoints" / f"iter_{iteration:07d}"
        return DistCheckpointing().read_common(folder)["optimizer"]["steps"]

    assert (steps("4-second", 3), steps("5-same", 3)) == (3, 6)


def test_a_finished_run_has_nothing_to_do(ranks, done, world):
    done("straight")
    before = {path: path.stat().st_mtime_ns for path in (world / "runs" / "straight" / "phases").glob("*/model/*")}
    again = ranks.run(work.phases, 1, write(world, "straight"), str(world), [], [])[0]
    assert again["said"].count("nothing to do") == 5 and "iteration " not in again["said"].replace(
        "after iteration", ""
    )
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_phase_may_be_added(ranks, done, world):
    """Those that have ended stay; the new one starts from the last."""
    done("straight")
    more = [*RUN["phases"], {"name": "more", "method": {"name": "none"}, "data": {"train": "world/source_train.jsonl"}}]
    said = ranks.run(work.phases, 1, write(world, "straight", phases=more), str(world), [], [])[0]["said"]
    assert said.count("nothing to do") == 5 and "phase 6 of 6: more" in said


def test_a_phase_added_where_the_last_export_lies_is_refused_with_the_remedy(ranks, world):
    one, two = ({"name": name, "method": {"name": "none"}, "data": {"train": CHATS}} for name in ("one", "two"))
    place = {"directory": "runs/grown", "export": "grown"}
    ranks.run(work.phases, 1, write(world, "grown", checkpoint=place, phases=[one]), str(world), [], [])
    with pytest.raises(RankError) as caught:
        ranks.run(work.phases, 1, write(world, "grown", checkpoint=place, phases=[one, two]), str(world), [], [])
    message = caught.value.message
    assert message.startswith(
        "phases.1: grown has the export of phase one, which was the last; give that phase `export: grown`"
    )
    phases, place["export"] = [one | {"export": "grown"}, two], "further"
    said = ranks.run(work.phases, 1, write(world, "grown", checkpoint=place, phases=phases), str(world), [], [])[0][
        "said"
    ]
    assert said.count("nothing to do") == 1 and (world / "further" / "model.safetensors").exists()


def changed(number, **keys):
    return [*RUN["phases"][:number], RUN["phases"][number] | keys, *RUN["phases"][number + 1 :]]


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        (changed(3, data={"train": "world/none.jsonl"}), ("phase second", "data.train", "none.jsonl")),
        (changed(3, data={"train": "bad.jsonl"}), ("phase second", "bad.jsonl:2")),
        (changed(1, shield={"ratio": 2}), ("phase first", "shield.ratio")),
        (changed(2, train={"global_batch_size": 3}), ("phase changed", "train.global_batch_size")),
        (changed(0, optimizer="kept"), ("phases.0.optimizer", "first phase")),
        (changed(1, optimizer="kept"), ("phases.1.optimizer", "method")),
        (changed(3, optimizer="kept"), ("phases.3.optimizer", "method")),
        (changed(1, export="hf"), ("phases.1.export", "hf")),
        (changed(1, export="runs/refused/phases/1-english/model"), ("phases.1.export", "phase english")),
        (changed(4, shield={"file": "phase:english"}, optimizer="fresh"), ("phases.4.shield.file", "method is none")),
        (changed(3, shield={"reserve": ["phase:english"]}), ("phases.3.shield.reserve", "phase:english", "method is none")),
        (changed(3, shield={"reserve": ["none.safetensors"]}), ("phase second", "shield.reserve.0", "none.safetensors")),
        (changed(3, shield={"granularity": "layer", "reserve": ["phase:first"]}), ("phase second", "shield.reserve", "layer")),
    ],
)  # fmt: skip
def test_bad_phases_are_refused_before_the_first_trains(ranks, world, phases, words):
    (world / "bad.jsonl").write_text('{"text": "a b c"}\n{"texd": "a"}\n')
    file = write(world, "refused", phases=phases)
    with pytest.raises(RankError) as caught:
        ranks.run(work.phases, 2, file, str(world), [], [])
    message = caught.value.message
    assert caught.value.kind == "UserError" and "\n" not in message
    assert all(word in message for word in words), message
    assert not (world / "runs" / "refused" / "phases").exists()


def test_another_shield_takes_no_moments(ranks, world):
    phases = [
        {"name": "one", "data": {"train": "world/target_train.jsonl"}},
        {"name": "two", "shield": {"file": "phase:one"}, "data": {"train": "world/target_train.jsonl"}},
        {
            "name": "three",
            "shield": {"file": "other.safetensors"},
            "optimizer": "kept",
            "data": {"train": "world/target_train.jsonl"},
        },
    ]
    file = write(world, "kept", phases=phases[:2])
    ranks.run(work.phases, 1, file, str(world), ["train.iterations=1"], [])
    shield = load_shield(world / "runs" / "kept" / "phases" / "2-two" / "given-shield.safetensors")
    shield.masks = {name: mask.constant(mask.granularity, mask.shape, True) for name, mask in shield.masks.items()}
    shield.counts = {name: mask.frozen_elements for name, mask in shield.masks.items()}
    shield.save(world / "other.safetensors")
    file = write(world, "kept", phases=phases)
    with pytest.raises(RankError) as caught:
        ranks.run(work.phases, 1, file, str(world), ["train.iterations=1"], [])
    assert "optimizer: kept" in caught.value.message and "other weights" in caught.value.message
