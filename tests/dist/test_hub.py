"""Models by their id on the hub: fetched, pinned to a commit, used offline, refused in one line; the hub is on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.dist.test_methods import ROOT, make_world
from tests.hub_server import serving

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(world):
    """A hub with the model and files that are not wanted."""
    with serving() as hub:
        published = world / "published"
        if not published.exists():
            shutil.copytree(world / "hf" / "source", published)
            (published / "original").mkdir()
            for name in ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "README.md"):
                (published / name).write_text("{}")
        hub.push("org/tiny", published)
        yield hub


def run(hub, cache, *command, ranks=1, offline=False):
    environment = (
        os.environ | hub.environment(cache) | {"OMP_NUM_THREADS": "1"} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    )
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return subprocess.run(
        [*launch, "megatron_ssu", *map(str, command)], env=environment, cwd=cache.parent, capture_output=True, text=True
    )


def run_file(world, folder, **checkpoint):
    """The example's run file with few iterations and the hub's model."""
    settings = yaml.safe_load((ROOT / "examples" / "methods" / "ssu.yaml").read_text())
    settings["model"]["path"] = "org/tiny"
    settings["shield"]["calibration"] |= {"path": str(world / "world" / "chat.jsonl"), "samples": 16}
    for name in ("train", "source_valid", "target_valid"):
        settings["data"][name] = str(world / settings["data"][name])
    settings["train"] |= {"iterations": 4, "eval_interval": 100}
    settings["checkpoint"] = {"directory": str(folder / "run"), "interval": 2, **checkpoint}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def moved(world, folder):
    """The model with other weights, as a later commit."""
    shutil.copytree(world / "published", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v + 0.01 for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def saved_model(folder):
    return yaml.safe_load((folder / "run" / "run.yaml").read_text())["model"]["path"]


def test_a_run_by_id_keeps_its_commit_while_the_branch_moves(world, hub, tmp_path):
    cache, file = tmp_path / "cache", run_file(world, tmp_path, export=str(tmp_path / "out"))
    commit = hub.push("org/tiny", world / "published")
    done = run(hub, cache, "train", file, "train.exit_after=2", "checkpoint.export=", ranks=2)
    assert saved_model(tmp_path) == f"org/tiny@{commit}", done.stderr
    fetched = {path.name for path in (cache / "hub" / "models--org--tiny" / "snapshots" / commit).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not {"pytorch_model.bin", "consolidated.safetensors", "original", "README.md"} & fetched
    assert (
        sum("GET /org/tiny/resolve" in r and "model.safetensors" in r for r in hub.requests) == 1
    )  # not by every rank

    later = hub.push("org/tiny", moved(world, tmp_path / "later"))
    assert later != commit
    done = run(hub, cache, "train", file)
    assert done.returncode == 0, done.stderr
    assert saved_model(tmp_path) == f"org/tiny@{commit}"
    adapted = ("--adapted", tmp_path / "out", "--shield", tmp_path / "run" / "shield.safetensors")
    done = run(hub, cache, "verify", "--source", f"org/tiny@{commit}", *adapted)
    assert done.returncode == 0, done.stderr
    done = run(hub, cache, "verify", "--source", "org/tiny", *adapted)
    assert done.returncode == 2 and "other weights" in done.stderr
    done = run(hub, cache, "train", file, f"model.path=org/tiny@{later}", f"checkpoint.export={tmp_path / 'other'}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_offline_a_cached_model_is_found(world, hub, tmp_path):
    cache, file = tmp_path / "cache", run_file(world, tmp_path)
    done = run(hub, cache, "train", file, offline=True)
    assert done.returncode == 2 and "not in the hub's cache" in done.stderr and "HF_HUB_OFFLINE" in done.stderr
    done = run(hub, cache, "estimate", file)
    assert done.returncode == 0, done.stderr
    assert not any("safetensors" in request for request in hub.requests)
    done = run(hub, cache, "score", file)
    assert done.returncode == 0, done.stderr
    hub.requests.clear()
    done = run(hub, cache, "train", file, offline=True)
    assert done.returncode == 0 and not hub.requests, done.stderr


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_cannot_be_fetched_is_refused_in_one_line(ranks, world, hub, tmp_path):
    hub.gated.add("org/gated")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(world / "published" / "config.json", bare)
    hub.push("org/bare", bare)
    file = run_file(world, tmp_path)
    refusals = {
        "org/gated": ["model.path", "org/gated is gated", "HF_TOKEN"],
        "org/missing": ["model.path", "org/missing is no directory", "no model of the hub"],
        "org/tiny@v2": ["model.path", "no revision v2"],
        "org/bare": ["model.path", "safetensors"],
    }
    for reference, words in list(refusals.items())[:: 1 if ranks == 1 else 3]:
        done = run(hub, tmp_path / "cache", "train", file, f"model.path={reference}", ranks=ranks)
        lines = [line for line in done.stderr.splitlines() if line.startswith("megatron-ssu")]
        assert len(lines) == 1 and (done.returncode == 2 or ranks > 1), done.stderr
        assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "run").exists()
    hub.url = "http://127.0.0.1:9"  # nobody listens
    done = run(hub, tmp_path / "cache", "train", file, "model.path=org/elsewhere")
    assert done.returncode == 2 and "could not be fetched from the hub" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
