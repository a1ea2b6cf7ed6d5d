"""One GPU: a run that was stopped and resumed has the bits of the one that was not, in bf16 and FP8."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ssu.engine.mesh import start_processes, stop_processes
from megatron_ssu.models.build import has_transformer_engine
from megatron_ssu.models.parallel_model import open_model
from megatron_ssu.shield.shield_file import load_shield
from megatron_ssu.shield.verify import verify
from megatron_ssu.train.checkpoints import Checkpoints, Progress
from megatron_ssu.train.identity import Identity
from megatron_ssu.train.trainer import Trainer
from tests.dist import resume_work as work
from tests.dist import work as steps
from tests.dist.test_shielded_training import random_shield
from tests.dist.work import RandomTokens, mesh
from tests.gpu.test_training_gpu import FP8, SIZES, needs_engine, require
from tests.models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
ROOT = Path(__file__).parents[2]
STEPS, STOP = 6, 3
ON_CPU = """
import pickle, signal, sys
from megatron_ssu.engine.cpu_backend import install_cpu_backend
from tests.dist import resume_work as work
install_cpu_backend()
run, shield, kick, answer = pickle.load(open(sys.argv[1], "rb"))
found = work.train_run(run, shield, kick=kick)
pickle.dump(found["history"], open(answer, "wb"))
"""


@pytest.fixture
def shielded(tmp_path):
    model = make_model("olmo2", tmp_path / "model", torch.bfloat16, **SIZES)
    return str(model), str(random_shield(model, tmp_path / "shield.safetensors"))


def make_run(model, directory, precision=None, optimizer=None, **options):
    run = work.make_run(model, mesh(), str(directory), "bf16", iterations=STEPS, interval=STEPS, **options)
    run.precision.transformer = dict(FP8.get(precision, {}))
    run.train.optimizer.update(optimizer or {})
    return run


def train(run, shield, **options):
    """As a process of its own would: nothing is left of the run before."""
    if has_transformer_engine():
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    start_processes()
    try:
        return work.train_run(run, shield, **options)
    finally:
        stop_processes()


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("precision", [None, *FP8], ids=str)
def test_three_steps_and_three_are_six(precision, async_save, shielded, tmp_path):
    require(precision)
    model, shield = shielded
    options = {"precision": precision, "async_save": async_save}
    quiet = train(make_run(model, tmp_path / "quiet", **options), shield)
    stopped = train(make_run(model, tmp_path / "run", **options), shield, kick=(0, STOP, signal.SIGUSR1))
    assert stopped["stopped"][0] == 75
    resumed = train(make_run(model, tmp_path / "run", **options), shield)
    assert sorted(resumed["history"]) == list(range(STOP + 1, STEPS + 1))
    assert all(quiet["history"][i] == resumed["history"][i] for i in resumed["history"])
    for what in ("weights", "moments"):
        assert all(torch.equal(a, b) for a, b in zip(quiet[what], resumed[what], strict=True)), what


AWARE, OFFLOAD = {"use_precision_aware_optimizer": True}, {"optimizer_cpu_offload": True}
OPTIMIZERS = {
    "precision-aware": AWARE,
    "offloaded": {**OFFLOAD, "optimizer_offload_fraction": 1.0},
    "precision-aware, offloaded": {**AWARE, **OFFLOAD, "optimizer_offload_fraction": 1.0},
    "precision-aware, half offloaded": {**AWARE, **OFFLOAD, "optimizer_offload_fraction": 0.5},
}


@needs_engine
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["column", "row"])
def test_other_optimizers_train_save_and_resume(granularity, optimizer, shielded, tmp_path):
    """As the default one does."""
    model, _ = shielded
    shield = random_shield(Path(model), tmp_path / f"{granularity}.safetensors", granularity)
    options = {"optimizer": OPTIMIZERS[optimizer]}
    usual = train(make_run(model, tmp_path / "usual"), str(shield))
    quiet = train(make_run(model, tmp_path / "quiet", **options), str(shield))
    histories = [np.array([run["history"][i][:2] for i in sorted(run["history"])]) for run in (usual, quiet)]
    assert np.allclose(*histories, rtol=1e-2)
    stopped = train(make_run(model, tmp_path / "run", **options), str(shield), kick=(0, STOP, signal.SIGUSR1))
    assert stopped["stopped"][0] == 75
    resumed = train(make_run(model, tmp_path / "run", **options), str(shield))
    assert sorted(resumed["history"]) == list(range(STOP + 1, STEPS + 1))
    assert all(quiet["history"][i] == resumed["history"][i] for i in resumed["history"])
    assert all(torch.equal(a, b) for a, b in zip(quiet["weights"], resumed["weights"], strict=True))


@needs_engine
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["column", "row", "element"])
def test_other_optimizers_move_no_frozen_bit(granularity, optimizer, shielded, tmp_path):
    model, _ = shielded
    shield = random_shield(Path(model), tmp_path / f"{granularity}.safetensors", granularity)
    options = {"optimizer": OPTIMIZERS[optimizer], "shield_file": str(shield), "target": str(tmp_path / "adapted")}
    start_processes()
    try:
        steps.train_steps(model, mesh(), 10, dtype="bf16", **options)
    finally:
        stop_processes()
    report = verify(Path(model), tmp_path / "adapted", shield)
    totals = report.totals(granularity)
    assert report.ok and totals["frozen"] > 0 and totals["moved_trainable"] > 0.85 * totals["trainable"]


def test_a_save_gathers_nothing_on_the_gpu(shielded, tmp_path):
    """The optimizer's state goes to the host as each rank holds it; an exchange would take 4 bytes per parameter and more."""
    model, shield = shielded
    start_processes()
    try:
        run = make_run(model, tmp_path / "run")
        session = open_model(run)
        trainer = Trainer(session, load_shield(shield))
        trainer.step(trainer.batches(RandomTokens(), 0))
        largest = max(p.numel() for p in session.chunks[0].parameters())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Checkpoints(run.checkpoint.directory).save(
            session, Progress(iteration=1), Identity({}), trainer.optimizer_state, trainer.method
        )
        assert torch.cuda.max_memory_allocated() - before < 8 * largest + 2**20
        assert torch.cuda.memory_allocated() - before < 2**16
    finally:
        stop_processes()


def test_a_checkpoint_of_the_cpu_resumes_on_the_gpu(shielded, tmp_path):
    """megatron-core's own layers there, Transformer Engine's here, where it is installed."""
    model, shield = shielded

    def on_cpu(name, kick):
        order, answer = tmp_path / f"{name}.order", tmp_path / f"{name}.answer"
        order.write_bytes(pickle.dumps((make_run(model, tmp_path / name), shield, kick, str(answer))))
        folders = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": folders}
        subprocess.run([sys.executable, "-c", ON_CPU, str(order)], check=True, env=environment, timeout=600)
        return pickle.loads(answer.read_bytes())

    quiet = on_cpu("quiet", None)
    on_cpu("run", (0, STOP, signal.SIGUSR1))
    resumed = train(make_run(model, tmp_path / "run"), shield)["history"]
    assert sorted(resumed) == list(range(STOP + 1, STEPS + 1))
    losses = [(quiet[i][0], resumed[i][0]) for i in sorted(resumed)]
    assert np.allclose(*zip(*losses, strict=True), rtol=1e-2)
