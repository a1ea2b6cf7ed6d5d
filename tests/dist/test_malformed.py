"""Malformed inputs through the command line: exit status 2, one line that says what is wrong, nothing changed on disk."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist.damages import (
    FINISHED,
    FRESH,
    ITER,
    PLAN,
    RESUME,
    SCORE,
    SHIELDED,
    VERIFY,
    bfloat16,
    both,
    config,
    cut,
    evil,
    evil_torch,
    flip,
    garbage,
    gone,
    held_by_another,
    line,
    main,
    nothing,
    plain,
    planned,
    replace,
    resealed,
    retrained,
    row,
    seeded,
    sharded,
    tensors,
    text,
)
from tests.models import make_model
from tests.unit.data_makers import make_hf_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RUN = """\
model: {path: hf}
shield: {calibration: {path: chats.jsonl, samples: 8, sequence_length: 32}}
data: {train: text.jsonl, source_valid: valid.jsonl, target_valid: valid.jsonl, sequence_length: 16, loader_workers: 0}
train: {iterations: 2, global_batch_size: 2, eval_batches: 1, optimizer: {lr: 1e-3}}
precision: {dtype: fp32}
checkpoint: {directory: run, interval: 1}
"""


def make_world(folder: Path) -> Path:
    """A model, data, a run that has ended with two checkpoints, and its export; the working directory."""
    os.chdir(folder)
    make_model("olmo2", folder / "hf", vocab_size=321, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    make_hf_tokenizer(folder / "hf")
    make_model(
        "olmo2", folder / "other", seed=1, vocab_size=321, hidden_size=32, intermediate_size=48, num_hidden_layers=2
    )
    make_hf_tokenizer(folder / "other")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": "Answer " * (i + 3)},
            ]
        }
        for i in range(12)
    ]
    texts = [{"text": f"Line {i} of the text. " * 5} for i in range(30)]
    for name, lines in (("chats", chats), ("text", texts), ("valid", texts[:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with gzip.open(folder / "text.jsonl.gz", "wt") as file:
        file.write((folder / "text.jsonl").read_text())
    (folder / "run.yaml").write_text(RUN)
    assert main("train", "run.yaml") == 0
    assert main("export", "run.yaml", "--output", "adapted") == 0
    assert not list((folder / "run").glob("run.lock*"))
    assert main("prepare", "--model", "hf", "--output", "ready", "text.jsonl") == 0
    other = ("run.yaml", "model.path=other", "checkpoint.directory=foreign")
    assert main("score", *other) == 0 and main("plan", *other) == 0
    (folder / "foreign" / "shield.safetensors").rename(folder / "foreign.safetensors")
    shutil.copytree(folder / "run", folder / "begun")  # a run that is not at its end
    (folder / "begun" / "checkpoints" / "latest").write_text("1\n")
    shutil.rmtree(folder / "begun" / "checkpoints" / "iter_0000002")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    before = Path.cwd()
    yield make_world(tmp_path_factory.mktemp("good"))
    os.chdir(before)


@pytest.fixture
def world(good, tmp_path, monkeypatch):
    """A copy of the good world to damage, as the working directory."""
    folder = tmp_path / "world"
    shutil.copytree(good, folder)
    monkeypatch.chdir(folder)
    return folder


def state(folder: Path) -> dict[str, str]:
    """Digest of every file; logs, which tell of every start, left out."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and "logs" not in p.relative_to(folder).parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


ROWS = [
    # run files
    row("no run file", nothing, "train missing.yaml", "missing.yaml"),
    row("run file is a folder", nothing, "train hf", "hf"),
    row("run file is not YAML", text("run.yaml", "model: {path: hf\n"), FRESH, "run.yaml", "YAML"),
    row("run file is a list", text("run.yaml", "- a\n- b\n"), FRESH, "run.yaml"),
    row("run file is empty", text("run.yaml", ""), FRESH, "run.yaml"),
    row("run file is binary", garbage("run.yaml"), FRESH, "run.yaml"),
    row("duplicate key", text("run.yaml", RUN + "precision: {dtype: bf16}\n"), FRESH, "run.yaml", "precision"),
    row("unknown section", text("run.yaml", RUN + "optimiser: {lr: 1}\n"), FRESH, "optimiser"),
    row("unknown key", nothing, FRESH + " train.iteration=5", "train.iteration: unknown key", "'iterations'"),
    row("wrong type", nothing, FRESH + " train.iterations=many", "train.iterations", "many"),
    row("override without a value", nothing, FRESH + " train.iterations=", "train.iterations"),
    row("zero iterations", nothing, FRESH + " train.iterations=0", "train.iterations"),
    row("ratio above one", nothing, FRESH + " shield.ratio=1.5", "shield.ratio", "1.5"),
    row("unknown method", nothing, FRESH + " method.name=sus", "method.name", "sus"),
    row("unknown option of a method", nothing, FRESH + " method.hft.rato=0.5", "method.hft.rato: unknown key", "'ratio'"),
    row("an option of a method that has none", nothing, FRESH + " method.none.cake=0.5", "method.none.cake", "there are none"),
    row("an option out of range", nothing, FRESH + " method.name=hft method.hft.ratio=2", "method.hft.ratio", "2"),
    row("estimate of a wrong option", nothing, "estimate run.yaml checkpoint.directory=new method.name=hft method.hft.ratio=2", "method.hft.ratio"),
    row("estimate beside another shield", nothing, "estimate run.yaml checkpoint.directory=begun shield.ratio=0.25", "begun/shield.safetensors", "shield.ratio"),
    row("rank above the model's", nothing, FRESH + " method.name=lora method.lora.rank=100000", "method.lora.rank", "at most"),
    row("a key that the method decides", nothing, FRESH + " method.name=layers shield.ratio=0.3", "shield.ratio", "layers"),
    row("a shield file for a method without", nothing, FRESH + " method.name=gmt shield.file=x", "shield.file", "gmt"),
    row("layers of a broken config", config(num_hidden_layers="4"), FRESH + " method.name=layers", "num_hidden_layers"),
    row("GMT by micro-batch with sequence parallelism", nothing, FRESH + " method.name=gmt method.gmt.mask=micro_batch parallel.sequence_parallel=true", "parallel.sequence_parallel"),
    row("changed since itself", nothing, FRESH + " shield.score=change shield.change_from=hf", "shield.change_from", "other weights"),
    row("unknown score", nothing, FRESH + " shield.score=wander", "shield.score", "wander"),
    row("unknown granularity", nothing, FRESH + " shield.granularity=colum", "shield.granularity", "colum"),
    row("impossible mesh", nothing, FRESH + " parallel.tensor_model_parallel_size=2", "2 (tensor)", "world size"),
    row("impossible batch", nothing, FRESH + " train.micro_batch_size=3", "train.global_batch_size"),
    row("sequence too long", nothing, FRESH + " data.sequence_length=4096", "data.sequence_length", "4096"),
    row("FP8 without a GPU", nothing, FRESH + " precision.fp8=hybrid precision.dtype=bf16", "precision.fp8", "CUDA"),
    row("context parallel without a GPU", nothing, FRESH + " parallel.context_parallel_size=2", "parallel"),
    row("bf16 from fp32", nothing, FRESH + " precision.dtype=bf16", "F32", "precision.dtype=fp32"),
    row("no directory to write", text("file", ""), "train run.yaml checkpoint.directory=file/new", "checkpoint.directory"),
    row("export exists", nothing, FRESH + " checkpoint.export=adapted", "checkpoint.export", "adapted"),
    # Hugging Face directories
    row("no model", nothing, FRESH + " model.path=allenai/OLMo-2", "model.path", "allenai/OLMo-2"),
    row("no config", gone("hf/config.json"), FRESH, "config.json", "missing"),
    row("broken config", cut("hf/config.json"), FRESH, "config.json", "JSON"),
    row("config is a list", text("hf/config.json", "[]"), FRESH, "config.json"),
    row("unknown family", config(model_type="mamba"), FRESH, "mamba", "llama"),
    row("config lacks a size", config(hidden_size=None), FRESH, "config.json", "hidden_size"),
    row("config of another size", config(intermediate_size=64), FRESH, "mlp.", "config.json"),
    row("config has more layers", config(num_hidden_layers=3), FRESH, "model.layers.2."),
    row("unsupported rope", config(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}), FRESH, "rope"),
    row("no weights", gone("hf/model.safetensors"), FRESH, "model.safetensors"),
    row("weights are pickles", lambda w: (w / "hf/model.safetensors").rename(w / "hf/pytorch_model.bin"), FRESH, "safetensors"),
    row("weights cut short", cut("hf/model.safetensors"), FRESH, "model.safetensors", "truncated"),
    row("weights' header damaged", flip("hf/model.safetensors", 0.0001), FRESH, "model.safetensors"),
    row("a shard is missing", sharded(lambda d: (d / "model-00002-of-00002.safetensors").unlink()), FRESH, "model-00002-of-00002"),
    row("a shard is cut", sharded(lambda d: os.truncate(d / "model-00001-of-00002.safetensors", 5000)), FRESH, "model-00001-of-00002"),
    row("the index is broken", sharded(lambda d: (d / "model.safetensors.index.json").write_text("{")), FRESH, "index.json"),
    row("the index leads out", sharded(lambda d: (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}}))), FRESH, "index.json", "../x"),
    row("a tensor is missing", tensors(lambda t: t.pop("model.norm.weight")), FRESH, "model.norm.weight", "missing"),
    row("a tensor too many", tensors(lambda t: t.update({"model.extra.weight": torch.zeros(2)})), FRESH, "model.extra.weight"),
    row("a tensor of another shape", tensors(lambda t: t.update({"model.norm.weight": torch.zeros(7)})), FRESH, "model.norm.weight", "[7]"),
    row("a tensor of another type", tensors(lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)})), FRESH, "model.norm.weight", "I32"),
    row("weights that are no numbers", tensors(lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))), SCORE, "layers.1"),
    row("no tokenizer", both(gone("hf/tokenizer.json"), gone("hf/tokenizer_config.json")), FRESH, "hf", "tokenizer"),
    row("broken tokenizer", cut("hf/tokenizer.json"), FRESH, "tokenizer"),
    row("tokenizer larger than the model", both(config(vocab_size=100), tensors(lambda t: t.update({n: t[n][:100].clone() for n in ("lm_head.weight", "model.embed_tokens.weight")}))), FRESH, "vocab"),
    row("rope_theta is no number", config(rope_theta="big"), FRESH, "config.json", "rope_theta", "'big'"),
    row("rope settings lack a part", config(rope_parameters=None, rope_scaling={"rope_type": "llama3", "factor": 8.0}), FRESH, "config.json", "rope"),
    row("rope settings that break the tokenizer's loading", config(rope_parameters=None, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "prepare run.yaml checkpoint.directory=new", "config.json"),
    row("hidden size is a word", config(hidden_size="big"), "plan run.yaml checkpoint.directory=run", "config.json", "hidden_size"),
    # data
    row("no data file", nothing, FRESH + " data.train=none.jsonl", "data.train", "none.jsonl"),
    row("empty data file", text("text.jsonl", ""), FRESH, "text.jsonl"),
    row("broken JSON", line("text.jsonl", 7, b'{"text": "a'), FRESH, "text.jsonl:7"),
    row("no text", line("text.jsonl", 5, b'{"body": "a"}'), FRESH, "text.jsonl:5", "text"),
    row("text is a number", line("text.jsonl", 4, b'{"text": 4}'), FRESH, "text.jsonl:4"),
    row("not UTF-8", line("text.jsonl", 9, b'{"text": "\xff\xfe"}'), FRESH, "text.jsonl:9", "UTF-8"),
    row("broken gzip", cut("text.jsonl.gz"), FRESH + " data.train=text.jsonl.gz", "text.jsonl.gz"),
    row("no gzip", lambda w: (w / "text.jsonl.gz").write_text("plain"), FRESH + " data.train=text.jsonl.gz", "text.jsonl.gz"),
    row("no zstd", text("text.jsonl.zst", "plain"), FRESH + " data.train=text.jsonl.zst", "text.jsonl.zst"),
    row("half a dataset", gone("ready.idx"), FRESH + " data.train=ready", "ready"),
    row("index cut short", cut("ready.idx"), FRESH + " data.train=ready", "ready.idx"),
    row("index of something else", garbage("ready.idx"), FRESH + " data.train=ready", "ready.idx"),
    row("tokens cut short", cut("ready.bin"), FRESH + " data.train=ready", "ready.bin"),
    row("prepare over what is there", nothing, "prepare --model hf --output ready text.jsonl", "ready", "--overwrite"),
    row("prepare without a model", nothing, "prepare --output x text.jsonl", "--model", "--output"),
    row("prepare a missing file", nothing, "prepare --model hf --output x none.jsonl", "none.jsonl"),
    # calibration
    row("no calibration", nothing, FRESH + " shield.calibration.path=none.jsonl", "shield.calibration.path", "none.jsonl"),
    row("empty calibration", text("chats.jsonl", ""), SCORE, "chats.jsonl"),
    row("chat of an unknown kind", line("chats.jsonl", 3, b'{"dialogue": []}'), SCORE + " shield.calibration.samples=12", "chats.jsonl:3"),
    row("chat that the template refuses", line("chats.jsonl", 2, b'{"messages": [{"role": "pope", "content": "x"}]}'), SCORE + " shield.calibration.samples=12", "chats.jsonl:2"),
    row("template is missing", lambda w: make_hf_tokenizer(w / "hf", template=None) and (w / "hf/chat_template.jinja").unlink(missing_ok=True), SCORE, "template"),
    # scores and shields
    row("no scores", nothing, "plan run.yaml checkpoint.directory=new", "scores"),
    row("scores cut", cut("run/scores.safetensors"), PLAN, "run/scores.safetensors"),
    row("scores altered", flip("run/scores.safetensors"), PLAN, "run/scores.safetensors"),
    row("scores of another model", nothing, PLAN + " model.path=other", "hf", "other"),
    row("scores are a pickle", evil("run/scores.safetensors"), PLAN, "run/scores.safetensors"),
    row("scores lack the score", nothing, PLAN + " shield.score=fisher", "fisher", "run/scores.safetensors"),
    row("shield cut", cut("run/shield.safetensors"), SHIELDED, "run/shield.safetensors"),
    row("shield altered", flip("run/shield.safetensors"), SHIELDED, "run/shield.safetensors"),
    row("shield of another model", nothing, SHIELDED + " model.path=other", "hf", "other"),
    row("shield is a model", lambda w: shutil.copy(w / "hf/model.safetensors", w / "run/shield.safetensors"), SHIELDED, "run/shield.safetensors"),
    row("no shield", nothing, "inspect none.safetensors", "none.safetensors"),
    row("compose over what is there", nothing, "compose union run/shield.safetensors run/shield.safetensors --output adapted/config.json", "adapted/config.json"),
    row("compose one", nothing, "compose union run/shield.safetensors --output x", "two"),
    row("scores of another model stay", seeded("seeded"), "train run.yaml checkpoint.directory=seeded model.path=other", "seeded/scores.safetensors", "hf", "weights"),
    row("scores of another model stay, without a shield", both(seeded("seeded"), gone("seeded/shield.safetensors")), "train run.yaml checkpoint.directory=seeded model.path=other", "seeded/scores.safetensors"),
    row("score over scores of another model", seeded("seeded"), "score run.yaml checkpoint.directory=seeded model.path=other", "seeded/scores.safetensors", "hf"),
    row("scores of another config.json", both(seeded("seeded"), config(rms_norm_eps=0.5)), "train run.yaml checkpoint.directory=seeded", "seeded/scores.safetensors", "config.json"),
    row("train does not score anew", seeded("seeded"), "train run.yaml checkpoint.directory=seeded shield.calibration.samples=5", "seeded/scores.safetensors", "megatron-ssu score"),
    row("plan over a shield of another model", both(seeded("seeded"), lambda w: shutil.copy(w / "foreign.safetensors", w / "seeded/shield.safetensors")), "plan run.yaml checkpoint.directory=seeded", "seeded/shield.safetensors", "other"),
    row("shield without its scores", both(seeded("seeded"), gone("seeded/scores.safetensors")), "train run.yaml checkpoint.directory=seeded", "seeded/shield.safetensors", "shield.file"),
    row("score into the model", nothing, "score run.yaml checkpoint.directory=hf", "checkpoint.directory", "model.path"),
    row("plan into the model", nothing, PLAN.replace("=new", "=hf"), "checkpoint.directory", "model.path"),
    row("prepare into the model", nothing, "prepare run.yaml checkpoint.directory=hf", "checkpoint.directory", "model.path"),
    row("score under a file", nothing, "score run.yaml checkpoint.directory=run.yaml/new", "run.yaml/new", "cannot be written"),
    row("plan under a file", nothing, PLAN.replace("=new", "=run.yaml/new"), "run.yaml/new", "cannot be written"),
    row("another job holds the run", held_by_another("begun"), RESUME, "begun", "node7", "SLURM job 4711"),
    row("another job holds the run, score", held_by_another("new"), SCORE, "node7"),
    row("another job holds the run, plan", held_by_another("new"), PLAN, "node7"),
    row("another job holds the run, prepare", held_by_another("new"), "prepare run.yaml checkpoint.directory=new", "node7"),
    # checkpoints
    row("latest names nothing", text("begun/checkpoints/latest", "7\n"), RESUME, "latest", "7"),
    row("latest is no number", text("begun/checkpoints/latest", "newest\n"), RESUME, "latest: must be the iteration of a checkpoint", "'newest'"),
    row("a shard cut", cut(f"{ITER}/*.distcp"), RESUME, "iter_0000001"),
    row("a shard missing", gone(f"{ITER}/*.distcp"), RESUME, "iter_0000001"),
    row("a shard altered", flip(f"{ITER}/*.distcp", 0.5), RESUME, "iter_0000001"),
    row("metadata cut", cut(f"{ITER}/.metadata"), RESUME, "iter_0000001"),
    row("metadata missing", gone(f"{ITER}/.metadata"), RESUME, "iter_0000001"),
    row("metadata that acts", resealed(evil(f"{ITER}/.metadata")), RESUME, "iter_0000001"),
    row("common part cut", cut(f"{ITER}/common.pt"), RESUME, "iter_0000001"),
    row("common part missing", gone(f"{ITER}/common.pt"), RESUME, "iter_0000001"),
    row("common part that acts", resealed(evil_torch(f"{ITER}/common.pt")), RESUME, "iter_0000001"),
    row("a shard cut, digests made anew", resealed(cut(f"{ITER}/*.distcp")), RESUME, "iter_0000001"),
    row("metadata cut, digests made anew", resealed(cut(f"{ITER}/.metadata")), RESUME, "iter_0000001"),
    row("common part cut, digests made anew", resealed(cut(f"{ITER}/common.pt")), RESUME, "iter_0000001"),
    row("digests missing", gone(f"{ITER}/digests.json"), RESUME, "digests.json", "missing"),
    row("digests are no JSON", garbage(f"{ITER}/digests.json"), RESUME, "digests.json"),
    row("changed shield", nothing, RESUME + " shield.ratio=0.25", "begun/shield.safetensors", "change it back"),
    row("changed method", nothing, RESUME + " method.name=hft", "method.name was 'ssu'", "'hft' now"),
    row("changed shield, scores gone", gone("begun/scores.safetensors"), RESUME + " shield.ratio=0.25", "begun/shield.safetensors", "shield.ratio"),
    row("export by another method", nothing, "export run.yaml --output out method.name=none", "method.name was 'ssu'"),
    row("changed calibration", nothing, RESUME + " shield.calibration.samples=5", "begun/scores.safetensors", "begun"),
    row("changed seed", nothing, RESUME + " train.seed=7", "train.seed was 1234"),
    row("changed file", text("text.jsonl", '{"text": "Other words."}\n' * 40), RESUME, "data.train", "documents"),
    row("a run that began is not to go on", nothing, RESUME + " checkpoint.resume=false", "checkpoint.resume", "iter_0000001"),
    row("plan anew under a run", nothing, PLAN.replace("=new", "=begun") + " shield.ratio=0.25", "begun/shield.safetensors", "began"),
    row("plan with a method that has no shield", nothing, PLAN + " method.name=none", "method.name", "none has no shield"),
    row("plan with a method that there is not", nothing, PLAN + " method.name=sus", "method.name", "sus"),
    row("document end that is no token", nothing, FRESH + " data.document_end=<|eod|>", "data.document_end", "<|eod|>", "hf"),
    row("plan over a given shield", nothing, PLAN + " shield.file=run/shield.safetensors", "shield.file", "plan"),
    row("score over given scores", nothing, SCORE + " shield.scores=run/scores.safetensors", "shield.scores", "score"),
    row("score anew under a run", nothing, SCORE.replace("=new", "=begun"), "begun/scores.safetensors", "begun"),
    row("prepare without data", nothing, "prepare run.yaml data.train=[]", "data.train"),
    row("prepare a run with a file's option", nothing, "prepare run.yaml --workers 3", "--workers", "data.workers"),
    row("prepare files with an override", nothing, "prepare --model hf --output new/x text.jsonl --overwrite a.b=1", "a.b=1"),
    row("a shield that is there already", planned("planned"), "train run.yaml checkpoint.directory=planned",
        "planned/shield.safetensors", "shield.file"),
    row("changed model", nothing, RESUME + " model.path=other", "scores of model hf, not of other", "weights"),
    row("changed model definition", config(rms_norm_eps=0.5), RESUME, "config.json", "scores"),
    row("changed model definition, no shield", both(plain("plain"), config(rms_norm_eps=0.5)), "train run.yaml checkpoint.directory=plain method.name=none train.iterations=3", "plain/checkpoints/iter_0000002", "rms_norm_eps) was 1e-05", "0.5 now"),
    row("a phase by number", nothing, "train run.yaml train.phase.number=2", "train.phase", "the list `phases`"),
    row("fewer iterations than there are", nothing, "train run.yaml train.iterations=1", "train.iterations: 1", "iter_0000002"),
    row("exported, of another shield", nothing, FINISHED + " shield.ratio=0.9", "run/shield.safetensors", "change it back"),
    row("exported, by a run that differs in the learning rate", retrained("slower"), FINISHED + " checkpoint.directory=slower train.optimizer.lr=1e-6", "checkpoint.export", "another export"),
    row("exported, of other data", nothing, FINISHED + " data.train=valid.jsonl", "data.train"),
    row("exported, of another seed", nothing, FINISHED + " train.seed=7", "train.seed was 1234"),
    row("an export of another run", replace("adapted/megatron-ssu.json", '"iteration": 2', '"iteration": 1'), FINISHED, "checkpoint.export", "adapted", "another export"),
    row("something else in the export's place", both(lambda w: (w / "junk").mkdir(), text("junk/thesis.txt", "")), FINISHED.replace("=adapted", "=junk"), "checkpoint.export", "junk"),
    row("export of another model", nothing, "export run.yaml --output out model.path=other", "weights' fingerprint"),
    row("export with another config.json", config(rms_norm_eps=0.5), "export run.yaml --output out", "rms_norm_eps) was 1e-05"),
    row("export in another precision", both(tensors(bfloat16), config(dtype="bfloat16")), "export run.yaml --output out precision.dtype=bf16", "iter_0000002"),
    row("export here", nothing, "export run.yaml --output .", "--output", "current directory"),
    row("export over the root", nothing, "export run.yaml --output /", "--output", "/ exists already"),
    row("train and export where nothing can be made", nothing, FRESH + " checkpoint.export=/proc/x", "checkpoint.export", "/proc"),
    row("train and export over the root", nothing, FRESH + " checkpoint.export=/", "checkpoint.export", "/ exists already"),
    row("estimate into a folder", nothing, "estimate run.yaml --json .", ".", "is a directory"),
    row("export up", nothing, "export run.yaml --output ..", "--output", "exists"),
    row("export under a file", nothing, "export run.yaml --output run.yaml/x", "--output", "run.yaml"),
    row("export to a home that is not expanded", nothing, "export run.yaml --output ~/x", "--output", "~"),
    row("export to a name that is too long", nothing, f"export run.yaml --output {'x' * 300}", "--output", "cannot be made"),
    row("changed learning", nothing, RESUME + " train.optimizer.weight_decay=0.5", "train.optimizer.weight_decay was"),
    row("no checkpoint to export", nothing, "export run.yaml checkpoint.directory=new --output out", "checkpoint"),
    row("no such iteration", nothing, "export run.yaml --iteration 9 --output out", "9"),
    row("export over what is there", nothing, "export run.yaml --output hf", "hf", "exists"),
    # verify
    row("verify with a report to nowhere", nothing, VERIFY + " --json none/x", "none/x", "cannot be written"),
    row("verify with a report in a folder's place", nothing, VERIFY + " --json hf", "hf", "directory"),
    row("verify without a model", nothing, VERIFY.replace("adapted --", "none --"), "none"),
    row("verify a cut model", cut("adapted/model.safetensors"), VERIFY, "adapted/model.safetensors"),
    row("verify the wrong source", nothing, VERIFY.replace("--source hf", "--source other"), "other"),
    row("verify another model", tensors(lambda t: t.pop("lm_head.weight"), "adapted/model.safetensors"), VERIFY, "lm_head.weight"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_one_line_and_nothing_changed(row, world, capsys):
    row.damage(world)
    before = state(world)
    capsys.readouterr()
    status = main(*row.command.split())
    printed = capsys.readouterr()
    said = printed.err.strip("\n")
    assert status == 2, (printed.out + printed.err)[-2000:]
    assert said.startswith("megatron-ssu: ") and "\n" not in said, printed.err[-3000:]
    missing = [word for word in row.words if word not in said]
    assert not missing, f"{missing} not in: {said}"
    assert "Traceback" not in printed.out and not (world / "evil-was-here").exists()
    after = state(world)
    assert {n: d for n, d in after.items() if n in before} == before, "something was overwritten"
    left = sorted(set(after) - set(before))
    # Datasets and scores that were complete before the mistake showed, and the run file, are kept.
    kept = (
        "begun/data/",
        "planned/",
        "seeded/run.yaml",
        "plain/run.yaml",
        "plain/data/",
        "new/run.yaml",
        "new/data/",
        "new/scores.safetensors",
        "new/shield.safetensors",
        "new/metrics.jsonl",
    )
    assert not [n for n in left if not n.startswith(kept)], left
    assert not [n for n in left if ".part" in n or ".tmp" in n], left


@pytest.mark.parametrize(
    "wrong",
    [
        "method.name=sus",
        "shield.score=wander",
        "shield.also_score=[magnitud]",
        "shield.granularity=colum",
        "shield.budget=kinds",
        "shield.protect.0={pattern: '*.qkv.weight', action: frozen}",
        "train.optimizer.min_lr=",
    ],
)
def test_a_name_that_there_is_not_is_refused_before_anything_is_made(wrong, world, capsys):
    overrides = ["shield.protect=[{pattern: norms, action: trainable}]", wrong]
    assert main("train", "run.yaml", "checkpoint.directory=new", *overrides) == 2
    assert wrong.split("=")[0].removesuffix(".0") in capsys.readouterr().err
    assert not (world / "new").exists()


def test_a_finished_run_has_nothing_to_do(world, capsys):
    """By the record in its export, after its identity was compared; nothing changes."""
    before = state(world)
    assert main(*FINISHED.split()) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert state(world) == before
    record = json.loads((world / "adapted" / "megatron-ssu.json").read_text())
    assert (record["run"], record["iteration"], record["source"]) == ("run", 2, "hf")


def test_a_finished_run_does_not_tokenize_again(world, capsys):
    for file in (world / "run" / "data").glob("text-*"):
        file.unlink()
    test_a_finished_run_has_nothing_to_do(world, capsys)


def test_an_export_reads_no_calibration_data(world):
    (world / "chats.jsonl").unlink()
    assert main("export", "run.yaml", "--output", "out") == 0


def test_an_export_carries_code_and_templates_of_the_tokenizer(world):
    folder = world / "hf" / "additional_chat_templates"
    folder.mkdir()
    (folder / "tools.jinja").write_text("{{ messages }}")
    (world / "hf" / "tokenization_mine.py").write_text("X = 1\n")
    (world / "hf" / "megatron-ssu.json").write_text("of an earlier run")
    assert main("export", "run.yaml", "--output", "out") == 0
    assert (world / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert (world / "out" / "tokenization_mine.py").read_text() == "X = 1\n"
    assert json.loads((world / "out" / "megatron-ssu.json").read_text())["iteration"] == 2


def test_the_table_is_long_enough():
    assert len(ROWS) >= 60 and len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    "damage,overrides,word",
    [
        (cut("text.jsonl.gz"), ("data.train=text.jsonl.gz",), "text.jsonl.gz"),
        (cut(f"{ITER}/*.distcp"), ("checkpoint.directory=begun",), "iter_0000001"),
    ],
    ids=["data", "checkpoint"],
)
def test_ranks_end_alike(damage, overrides, word, world):
    """Under torchrun: the line once, every rank with status 2, no rank waits for another."""
    damage(world)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_ssu", "train", "run.yaml", "checkpoint.directory=new", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=world)
    lines = [text for text in done.stderr.splitlines() if text.startswith("megatron-ssu")]
    assert len(lines) == 1 and word in lines[0], done.stderr[-3000:]
    assert done.returncode != 0 and done.stderr.count("exitcode  : 2") + done.stderr.count("exitcode : 2") >= 1
