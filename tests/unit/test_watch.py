"""What a run watches: losses that jump, ranks that stop, what a checkpoint is compared with."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ssu.engine.optimizer import MAIN
from megatron_ssu.errors import UserError
from megatron_ssu.estimate.flops import flops_per_token
from megatron_ssu.estimate.hardware import peak_flops
from megatron_ssu.models.families import family_of
from megatron_ssu.models.family import Dims
from megatron_ssu.train import update_norms as updates
from megatron_ssu.train import watchdog
from megatron_ssu.train.callbacks.loss_spikes import SpikeWatch
from megatron_ssu.train.identity import Identity
from megatron_ssu.train.watchdog import Heartbeat, Watchdog, describe
from tests.models import make_model


def heartbeat(beat=1, iteration=7, waiting=True, place="loop.py:9"):
    return Heartbeat("node3", beat, iteration, "forward-backward", waiting, place)


def test_a_jump_is_told_once_there_is_something_to_compare_with():
    draw, watch = random.Random(0), SpikeWatch(6.0)
    assert watch.jump(50.0) is None
    watch = SpikeWatch(6.0)
    assert all(watch.jump(3.0 + draw.gauss(0, 0.05)) is None for _ in range(200))
    mean, spread = watch.jump(3.6)
    assert mean == pytest.approx(3.0, abs=0.02) and spread == pytest.approx(0.05, rel=0.3)
    assert watch.jump(float("nan")) is None
    assert watch.jump(1.0) is None, "a loss that falls is no spike"


def test_no_spikes_where_none_are_asked_for():
    watch = SpikeWatch(0.0)
    assert [watch.jump(x) for x in [1.0] * 30 + [1e9]] == [None] * 31


def test_the_rank_whose_heart_stopped_is_named():
    before = {r: heartbeat(beat=4) for r in range(4)}
    after = {r: heartbeat(beat=4 if r == 1 else 6) for r in range(4)}
    assert describe(before, after, 4, 0).startswith(
        "rank 1 is dead or stopped (forward-backward of iteration 7 at loop.py:9"
    )
    del after[3]
    assert "rank 3 is dead or stopped (it never began)" in describe({}, after, 4, 0)


def test_the_rank_that_does_not_wait_is_named():
    before = {r: heartbeat(beat=4) for r in range(3)}
    after = {r: heartbeat(beat=6, waiting=r != 2, place=f"file{r}.py:1") for r in range(3)}
    assert describe(before, after, 3, 0) == "rank 2 hangs (forward-backward of iteration 7 at file2.py:1 on node3)"


def test_the_rank_that_is_behind_is_named():
    before = {r: heartbeat(beat=4) for r in range(3)}
    after = {r: heartbeat(beat=6, iteration=6 if r == 1 else 7, waiting=r != 2) for r in range(3)}
    assert describe(before, after, 3, 0).startswith("rank 1 hangs")


def test_all_alike_blames_nobody():
    beats = {r: heartbeat(beat=4, waiting=False) for r in range(3)}
    later = {r: heartbeat(beat=6, waiting=False) for r in range(3)}
    assert "none is behind the others" in describe(beats, later, 3, 0)


class CountingStore:
    """A store for one job's ranks that counts how often every key is read."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        with self._lock:
            self.read[key] += 1
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            self._values[key] = str(int(self._values.get(key, b"0")) + amount).encode()
            return int(self._values[key])


def test_a_few_ranks_read_all_heartbeats_and_the_others_hear_of_it(monkeypatch):
    """Else n hung ranks ask the store for n heartbeats each, twice."""
    world, store, said = 24, CountingStore(), {}
    monkeypatch.setattr(watchdog, "_own_store", lambda rank: store)
    monkeypatch.setattr(watchdog, "_PATIENCE", 10**6)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: world)
    dogs: list[Watchdog] = []
    for rank in range(world - 1):  # the last is dead
        monkeypatch.setattr(watchdog.dist, "get_rank", lambda rank=rank: rank)
        dogs.append(Watchdog(1000.0))

    def beat(self: Watchdog, seconds: float = 0.0) -> None:
        time.sleep(0.001)
        for dog in dogs:
            dog._publish()

    monkeypatch.setattr(Watchdog, "_pause", beat)
    beat(dogs[0])
    threads = [threading.Thread(target=lambda r=r, d=d: said.update({r: d.found()})) for r, d in enumerate(dogs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(said.values()) == {"rank 23 is dead or stopped (it never began)"} and len(said) == world - 1
    assert store.read["heartbeat/0"] <= 2 * watchdog._READERS


def test_a_rank_asks_itself_where_those_that_read_have_died(monkeypatch):
    store = CountingStore()
    monkeypatch.setattr(watchdog, "_own_store", lambda rank: store)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 0)
    dog = Watchdog(1000.0, beat=0.01)
    store.add("readers", watchdog._READERS)
    assert dog.found() == "rank 1 is dead or stopped (it never began)"


class LargestOutput(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation allocates."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, found.nbytes)
        return found


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_update_norms_need_no_copy_of_a_shard(decay, monkeypatch):
    """The squares are those of torch's own AdamW steps, and no temporary is larger than a chunk."""
    monkeypatch.setattr(updates, "CHUNK", 1000)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 37))
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=decay)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    states = {MAIN: weight.detach(), **optimizer.state[weight]}
    with LargestOutput() as largest:
        found = updates.change_square(states, 3, optimizer.param_groups[0], True)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx((weight.detach() - before).double().square().sum().item(), rel=1e-5)
    assert 0 < largest.bytes <= 8 * 1000


@pytest.mark.parametrize(
    "name,tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peaks_of_known_gpus(name, tflops):
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["cpu", "NVIDIA GeForce GTX 1080", "NVIDIA H1000"])
def test_no_peak_is_made_up(name):
    assert peak_flops(name) is None


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_six_for_every_weight_that_multiplies(tied, tmp_path):
    import transformers

    path = make_model("llama", tmp_path / "model", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    hf = model.config.to_dict()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = 12 * hf["num_hidden_layers"] * hf["hidden_size"] * 64
    assert flops_per_token(family_of(hf), Dims.from_hf(hf), 64) == 6 * weights + attention


def test_a_changed_run_file_is_named():
    saved = {"train.seed": 1, "data.seed": 2, "precision.dtype": "bf16"}
    Identity(dict(saved)).compare(saved, "iter")
    with pytest.raises(UserError, match=r"iter: precision\.dtype was 'bf16' in this checkpoint and is 'fp32' now"):
        Identity({**saved, "precision.dtype": "fp32"}).compare(saved, "iter")
    with pytest.raises(UserError, match=r"change it back, or start in another checkpoint\.directory"):
        Identity({**saved, "data.seed": 3}).compare(saved, "iter")
    with pytest.raises(UserError, match="was not set in this checkpoint"):
        Identity({**saved, "train.global_batch_size": 4}).compare(saved, "iter")
