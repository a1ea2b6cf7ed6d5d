"""The run file: what is refused and how, what comes out, and that it comes back the same."""

from __future__ import annotations

import dataclasses
import enum
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from megatron.core.transformer.enums import AttnBackend

from megatron_ssu.config.coerce import DTYPES, field_hint, field_hints, is_union, settable
from megatron_ssu.config.load import dump_run, load_run, save_run
from megatron_ssu.config.megatron_fields import DDP, MODEL_PARALLEL, OPTIMIZER, TRANSFORMER
from megatron_ssu.config.schema import OPTIMIZER_DEFAULTS, DataSource, RunConfig
from megatron_ssu.config.units import seconds
from megatron_ssu.errors import UserError

MINIMAL = "model: {path: hf}\ncheckpoint: {directory: out}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run(path, overrides)


# what is added to MINIMAL (or, where it starts with "=", replaces it), overrides, words of the message
MALFORMED: list[tuple[str, list[str], list[str]]] = [
    # keys
    ("trian: {}", [], ["run.yaml:3", "trian", "unknown section", "did you mean 'train'?"]),
    ("train:\n  iteratoins: 5", [], ["run.yaml:4", "train.iteratoins", "did you mean 'iterations'?"]),
    ("train: {recompute_granularity: full}", [], ["train.recompute_granularity", "belongs under model"]),
    ("train: {lr: 1e-4}", [], ["train.lr", "belongs under train.optimizer"]),
    ("tensor_model_parallel_size: 2", [], ["tensor_model_parallel_size", "belongs under parallel"]),
    ("parallel: {overlap_grad_reduce: true}", [], ["parallel.overlap_grad_reduce", "belongs under parallel.ddp"]),
    ("parallel: {tp: 2}", [], ["parallel.tp", "parallel.tensor_model_parallel_size"]),
    ("train: {learning_rate: 1e-4}", [], ["train.learning_rate", "did you mean 'train.optimizer.lr'?"]),
    ("train: {optimizer: {adam_bta1: 0.9}}", [], ["train.optimizer.adam_bta1", "did you mean 'adam_beta1'?"]),
    ("log: {colour: true}", [], ["log.colour", "known here: interval, tensorboard"]),
    ("shield: {calibration: {sampels: 4}}", [], ["shield.calibration.sampels", "did you mean 'samples'?"]),
    ("data: {train: [{path: a.jsonl, wieght: 2}]}", [], ["data.train.0.wieght", "did you mean 'weight'?"]),
    ("parallel: {transformer: {}}", [], ["parallel.transformer", "directly under parallel"]),
    ("parallel: {hidden_size: 8}", [], ["parallel.hidden_size", "config.json of model.path decides it"]),
    ("train: {optimizer: {bf16: true}}", [], ["train.optimizer.bf16", "precision.dtype decides it"]),
    ("train: {bf16: true}", [], ["train.bf16", "precision.dtype decides it"]),
    ("parallel: {ddp: {use_distributed_optimizer: true}}", [], ["use_distributed_optimizer", "training loop sets it"]),
    ("train: {1: 2}", [], ["train", "the key 1 is not a word"]),
    ("train: {seed: 1, seed: 2}", [], ["run.yaml:3", "train.seed", "given twice", "line 3"]),
    ("train: {}\ntrain: {}", [], ["run.yaml:4", "train", "given twice", "line 3"]),
    ("=checkpoint: {directory: out}", [], ["model.path", "missing"]),
    ("=model: {path: hf}", [], ["checkpoint.directory", "missing"]),
    ("data: {train: [{weight: 2}]}", [], ["run.yaml:3", "data.train.0.path", "missing"]),
    # types
    ("train: {iterations: 1e3}", [], ["train.iterations", "whole number", "'1e3'", "write 1000"]),
    ("train: {iterations: 10.0}", [], ["train.iterations", "whole number", "10.0", "write 10"]),
    ("train: {iterations: 10.5}", [], ["train.iterations", "whole number", "10.5"]),
    ("train: {iterations: '10'}", [], ["train.iterations", "whole number", "write 10"]),
    ("train: {iterations: true}", [], ["train.iterations", "whole number", "not true"]),
    ("train: {iterations: }", [], ["train.iterations", "whole number", "not null"]),
    ("train: {optimizer: {lr: .nan}}", [], ["train.optimizer.lr", "finite", "nan"]),
    ("train: {optimizer: {lr: .inf}}", [], ["train.optimizer.lr", "finite", "inf"]),
    ("train: {optimizer: {lr: 1e999}}", [], ["train.optimizer.lr", "finite", "inf"]),
    ("train: {optimizer: {lr: '0.1'}}", [], ["train.optimizer.lr", "a number", "remove the quotes"]),
    ("train: {optimizer: {lr: true}}", [], ["train.optimizer.lr", "a number", "not true"]),
    ("train: {optimizer: {weight_decay: }}", [], ["train.optimizer.weight_decay", "a number", "not null"]),
    ("train: {optimizer: {exp_avg_dtype: bf15}}", [], ["train.optimizer.exp_avg_dtype", "'bf16'", "'fp32'"]),
    ("train: {optimizer: 5}", [], ["train.optimizer", "a mapping", "not 5"]),
    ("train: 5", [], ["run.yaml:3", "train", "a mapping", "not 5"]),
    ("train: []", [], ["train", "a mapping", "not a list"]),
    ("precision: {dtype: fp16}", [], ["precision.dtype", "'bf16' or 'fp32'", "'fp16'"]),
    ("train: {schedule: {decay_style: cosin}}", [], ["decay_style", "'WSD'", "did you mean 'cosine'?"]),
    ("precision: {fp8: e5m2}", [], ["precision.fp8", "'e4m3' or 'hybrid'"]),
    ("model: {path: 7}", [], ["given twice"]),
    ("=model: {path: 7}\ncheckpoint: {directory: out}", [], ["model.path", "expected text", "put it in quotes"]),
    ("=model: {path: a}\ncheckpoint: {directory: 2024-01-01}", [], ["checkpoint.directory", "text", "quotes"]),
    (
        "=model: {path: a, attention_backend: flush}\ncheckpoint: {directory: o}",
        [],
        ["model.attention_backend", "flash"],
    ),
    ("=model: {path: a, quant_recipe: x}\ncheckpoint: {directory: o}", [], ["model.quant_recipe", "cannot be set"]),
    (
        "=model: {path: a, embedding_init_method: x}\ncheckpoint: {directory: o}",
        [],
        ["embedding_init_method", "cannot"],
    ),
    (
        "=model: {path: a, recompute_modules: mlp}\ncheckpoint: {directory: o}",
        [],
        ["recompute_modules", "a list of text"],
    ),
    ("=model: {path: a, window_size: [1]}\ncheckpoint: {directory: o}", [], ["window_size", "2 values", "not 1"]),
    ("=model: {path: a, layout: 1}\ncheckpoint: {directory: o}", [], ["model.layout", "unknown key"]),
    ("log: {tensorboard: 'yes'}", [], ["log.tensorboard", "true or false", "remove the quotes"]),
    ("log: {tensorboard: 1}", [], ["log.tensorboard", "true or false", "write true"]),
    ("shield: {method: none}", [], ["shield.method", "method.name", "full fine-tuning"]),
    ("shield: {file: none}", [], ["shield.file", "write null"]),
    ("method: {name: no}", [], ["method.name", "expected text, not false", "quotes"]),
    ("shield: {kinds: {mlp: much}}", [], ["shield.kinds.mlp", "a number", "'much'"]),
    ("shield: {kinds: [mlp]}", [], ["shield.kinds", "a mapping of names to a number", "not a list"]),
    ("shield: {kinds: {1: 0.5}}", [], ["shield.kinds", "the key 1 is not a word"]),
    ("shield: {protect: [{pattern: head}]}", [], ["shield.protect.0.action", "missing"]),
    ("data: {train: 5}", [], ["data.train", "text or a list", "not 5"]),
    ("data: {train: {path: a}}", [], ["data.train", "not a mapping"]),
    ("data: {train: [5]}", [], ["data.train.0", "a mapping (path, weight, ", "not 5"]),
    ("data: {train: [{path: a, weight: heavy}]}", [], ["data.train.0.weight", "a number", "'heavy'"]),
    ("checkpoint2: {keep: all}", [], ["checkpoint2", "did you mean 'checkpoint'?"]),
    # YAML
    ("train: {iterations: 5", [], ["run.yaml:", "YAML"]),
    ("train:\n\titerations: 5", [], ["run.yaml:4", "YAML", "\\t"]),
    ("train: !!python/object:os.system {}", [], ["run.yaml:3", "YAML", "python/object"]),
    ("train: {? [1]: 2}", [], ["run.yaml:3", "YAML"]),
    ("---\ntrain: {}", [], ["run.yaml:3", "YAML", "document"]),
    ("data: {train: &a [*a]}", [], ["run.yaml:3", "must not hold itself"]),
    ("train: {iterations: !!int abc}", [], ["run.yaml", "YAML"]),
    ("data: {train: " + "[" * 5000 + "]" * 5000 + "}", [], ["run.yaml", "nested too deep"]),
    ("=", [], ["run.yaml", "empty"]),
    ("=# only a comment\n", [], ["run.yaml", "empty"]),
    ("=- a\n- b", [], ["run.yaml", "a list"]),
    ("=hello", [], ["run.yaml", "'hello'"]),
    # overrides
    ("", ["train.iterations"], ["command line", "'train.iterations'", "section.key=value"]),
    ("", ["=5"], ["command line", "'=5'", "section.key=value"]),
    ("", ["train..seed=5"], ["command line", "section.key=value"]),
    ("", ["train.iterations=ten"], ["command line", "train.iterations", "whole number", "'ten'"]),
    ("train: {iterations: 5}", ["train.iterations=ten"], ["command line", "train.iterations"]),
    ("", ["train.itera=5"], ["train.itera", "did you mean 'iterations'?"]),
    ("", ["train.iteration=5"], ["command line", "train.iteration", "did you mean 'iterations'?"]),
    ("", ["train.iterations="], ["command line", "train.iterations", "not null"]),
    ("", ["model.path.x=1"], ["command line", "model.path is 'hf'", "no key 'x'"]),
    ("data: {train: [a]}", ["data.train.1=b"], ["command line", "data.train.1", "a list of 1", "0 to 0"]),
    ("data: {train: [a]}", ["data.train.last=b"], ["command line", "data.train.last", "a list of 1"]),
    ("data: {train: [a]}", ["data.train.0.weight=2"], ["command line", "data.train.0 is 'a'", "no key 'weight'"]),
    ("", ["data.train=[a"], ["command line", "data.train", "not a YAML value", "quotes"]),
    ("", ["train={seed: 1, seed: 2}"], ["command line", "train.seed", "given twice"]),
]


@pytest.mark.parametrize(("text", "overrides", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_run_files_are_one_helpful_line(
    tmp_path: Path, text: str, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text[1:] if text.startswith("=") else MINIMAL + text, *overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) - len(str(tmp_path)) < 400
    for word in words:
        assert word in message


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("model: {path: café}".encode("latin-1"))
    (tmp_path / "control.yaml").write_bytes(b"model: {path: a\x00b}")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 21))
    cases = {
        "missing.yaml": "no such run file",
        "": "is a directory",
        "latin.yaml": "not UTF-8",
        "control.yaml": "not readable as YAML",
        "large.yaml": "bytes",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            load_run(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


def test_message_is_exact(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, MINIMAL + "train:\n  global_batch_sise: 8\n")
    expected = f"{tmp_path}/run.yaml:4: train.global_batch_sise: unknown key; did you mean 'global_batch_size'?"
    assert str(caught.value) == expected


def test_defaults_yaml_overrides_in_this_order(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL + "train: {optimizer: {lr: 1e-4, clip_grad: 2}, seed: 7}", "train.optimizer.lr=3e-4")
    assert run.train.optimizer == {**OPTIMIZER_DEFAULTS, "lr": 3e-4, "clip_grad": 2.0}
    assert isinstance(run.train.optimizer["clip_grad"], float)
    assert (run.train.seed, run.train.iterations) == (7, -1)


def test_values_are_read_as_their_types(tmp_path: Path) -> None:
    text = """
model: {path: hf, attention_backend: unfused, window_size: [128, 0], recompute_modules: [mlp]}
checkpoint: {directory: out, max_shard_size: 1000000}
parallel: {tensor_model_parallel_size: 2, sequence_parallel: true, ddp: {bucket_size: 40_000}}
precision: {fp8: hybrid}
train: {optimizer: {exp_avg_dtype: bf16, main_params_dtype: torch.float32, adam_eps: 1e-8}}
data: {train: [a.jsonl, {path: b, weight: 2}]}
log:
"""
    run = load(tmp_path, text)
    assert run.model.transformer == {
        "attention_backend": AttnBackend.unfused,
        "window_size": (128, 0),
        "recompute_modules": ["mlp"],
    }
    assert (run.parallel.tensor, run.parallel.pipeline, run.parallel.sequence_parallel) == (2, 1, True)
    assert run.parallel.ddp == {"bucket_size": 40000}
    assert run.precision.transformer == {"fp8": "hybrid"}
    assert run.train.optimizer["exp_avg_dtype"] is torch.bfloat16
    assert run.train.optimizer["main_params_dtype"] is torch.float32
    assert run.train.optimizer["adam_eps"] == 1e-8
    assert run.data.train == ["a.jsonl", DataSource("b", 2.0)]
    assert run.checkpoint.max_shard_size == 1000000


def test_overrides_reach_lists_mappings_and_null(tmp_path: Path) -> None:
    text = MINIMAL + "shield: {file: a}\ndata: {train: [a, {path: b}]}"
    run = load(tmp_path, text, "shield.file=", "data.train.1.weight=3", "data.train.0={path: c}", "log.interval=5")
    assert run.shield.file is None
    assert run.data.train == [DataSource("c"), DataSource("b", 3.0)]
    assert run.log.interval == 5
    assert load(tmp_path, text, "data.train=[x, y]").data.train == ["x", "y"]
    assert load(tmp_path, text, "shield.file=a=b").shield.file == "a=b"
    assert load(tmp_path, text, "data.split='8,1,1'").data.split == "8,1,1"


def test_times_are_no_numbers_to_the_base_60(tmp_path: Path) -> None:
    for written in ("11:50:00", "1:50:00", "1-00:00:00", "01:50:00"):
        assert load(tmp_path, MINIMAL, f"train.exit_after={written}").train.exit_after == written
    again = load(tmp_path, dump_run(load(tmp_path, MINIMAL + "train: {exit_after: 1:50:00}\n")))
    assert seconds(again.train.exit_after) == 6600


@pytest.mark.parametrize("written", ["010", "0200", "08", "-010", "0_10"])
def test_a_leading_zero_is_refused_and_not_read_as_octal(tmp_path: Path, written: str) -> None:
    decimal = int(written)
    for text, override in (
        (MINIMAL, [f"train.iterations={written}"]),
        (MINIMAL + f"train: {{iterations: {written}}}\n", []),
    ):
        with pytest.raises(UserError, match=rf"train\.iterations: expected a whole number, .*write {decimal}"):
            load(tmp_path, text, *override)
    run = load(tmp_path, MINIMAL, f"data.text_key={written}", "train.iterations=0x10", "data.sequence_length=1_000")
    assert (run.data.text_key, run.train.iterations, run.data.sequence_length) == (written, 16, 1000)
    assert load(tmp_path, dump_run(run)).data.text_key == written
    assert load(tmp_path, MINIMAL, "train.iterations=0").train.iterations == 0


def test_override_changes_one_use_of_an_alias(tmp_path: Path) -> None:
    text = MINIMAL + "data:\n  train:\n  - &part {path: a, weight: 1}\n  - *part\n"
    run = load(tmp_path, text, "data.train.0.weight=5")
    assert run.data.train == [DataSource("a", 5.0), DataSource("a", 1.0)]


def test_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    text = MINIMAL + "shield:\n  calibration: &c {samples: 3, seed: 1}\ndata: {train: [a]}\n"
    text += "train:\n  schedule: &s {warmup_fraction: 0.1}\n"
    assert load(tmp_path, text).shield.calibration.samples == 3
    with pytest.raises(UserError, match=r"log\.samples"):
        load(tmp_path, text + "log:\n  <<: *c\n")


def test_dump_and_load_give_the_same_run(tmp_path: Path) -> None:
    text = """
model: {path: "größe: 1", attention_backend: auto, window_size: [1, 2], cp_comm_type: [p2p]}
checkpoint: {directory: "2024", keep: 3, max_shard_size: 123, export: "1e-4"}
parallel: {tensor_model_parallel_size: 2, virtual_pipeline_model_parallel_size: null, ddp: {overlap_grad_reduce: true}}
precision: {dtype: fp32, fp8: e4m3, fp8_margin: 1}
shield: {ratio: 0.3, kinds: {mlp: 1, attention: 0.25}, calibration: {path: [a.jsonl, b.jsonl], samples: 3}}
data: {train: [a.jsonl, {path: b, weight: 2.5}, "null"], split: "9,1,0"}
train: {optimizer: {lr: 1e-12, exp_avg_dtype: fp16, decoupled_lr: 1e+20}}
"""
    run = load(tmp_path, text)
    saved = tmp_path / "folder" / "resolved.yaml"
    save_run(run, saved)
    assert load_run(saved) == run
    assert dump_run(load_run(saved)) == saved.read_text(encoding="utf-8")
    assert [p.name for p in saved.parent.iterdir()] == ["resolved.yaml"]
    resolved = yaml.safe_load(saved.read_text(encoding="utf-8"))
    assert resolved["parallel"]["tensor_model_parallel_size"] == 2
    assert resolved["train"]["optimizer"]["weight_decay"] == OPTIMIZER_DEFAULTS["weight_decay"]
    assert resolved["train"]["iterations"] == -1
    assert "transformer" not in resolved["model"]


def test_defaults_round_trip(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL)
    assert load(tmp_path, dump_run(run)) == run


def test_save_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(tmp_path, MINIMAL)
    target = tmp_path / "resolved.yaml"
    target.write_text("before")

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(UserError, match="No space left"):
        save_run(run, target)
    assert target.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resolved.yaml", "run.yaml"]


def sample(hint: Any) -> Any:
    """A YAML value that a field of type `hint` accepts."""
    if is_union(hint):
        return sample(next(arm for arm in get_args(hint) if arm is not type(None) and settable(arm)))
    if get_origin(hint) is Literal:
        return get_args(hint)[-1]
    if get_origin(hint) is list:
        return [sample(get_args(hint)[0])]
    if get_origin(hint) is tuple:
        return [sample(arm) for arm in get_args(hint) if arm is not ...]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next(iter(hint.__members__))
    return {bool: True, int: 3, float: 0.5, str: "word", torch.dtype: "bf16"}[hint]


def megatron_sections() -> list[tuple[str, str, dataclasses.Field]]:
    found = []
    for section in dataclasses.fields(RunConfig):
        if section.name == "phases":
            continue
        for field in dataclasses.fields(field_hints(RunConfig)[section.name]):
            if "megatron" in field.metadata:
                where = section.name if field.metadata["inline"] else f"{section.name}.{field.name}"
                found.append((section.name, where, field))
    return found


def test_every_megatron_field_is_reachable_or_refused_by_name(tmp_path: Path) -> None:
    reached = 0
    for section, where, field in megatron_sections():
        cls = field.metadata["megatron"].load()
        members = {f.name: f for f in dataclasses.fields(cls)}
        overrides, expected = [], {}
        for name in sorted(field.metadata["names"]):
            hint = field_hint(cls, members[name])
            if not settable(hint):
                with pytest.raises(UserError, match=rf"{where}\.{name}: cannot be set"):
                    load(tmp_path, MINIMAL, f"{where}.{name}=x")
                continue
            value = sample(hint)
            overrides.append(f"{where}.{name}={json.dumps(value)}")
            expected[name] = value
        values = getattr(getattr(load(tmp_path, MINIMAL, *overrides), section), field.name)
        for name, value in expected.items():
            got = values[name]
            plain = got.name if isinstance(got, enum.Enum) else list(got) if isinstance(got, tuple) else got
            assert plain == (getattr(torch, DTYPES[value]) if isinstance(got, torch.dtype) else value), name
        reached += len(expected)
        for name, reason in field.metadata["owned"].items():
            if name in members and name not in field.metadata["names"]:
                with pytest.raises(UserError, match=rf"{where}\.{name}: ") as caught:
                    load(tmp_path, MINIMAL, f"{where}.{name}=1")
                assert reason in str(caught.value) or "belongs under" in str(caught.value)
    assert reached > 200


def test_every_owned_name_is_a_field_of_megatron() -> None:
    for _, where, field in megatron_sections():
        names = set(field.metadata["megatron"].names)
        assert set(field.metadata["owned"]) <= names | {"autocast_dtype", "enable_autocast"}, where


def test_optimizer_defaults_are_fields() -> None:
    assert set(OPTIMIZER_DEFAULTS) <= set(OPTIMIZER.names)


@pytest.mark.parametrize("cls", [MODEL_PARALLEL, TRANSFORMER, OPTIMIZER, DDP], ids=lambda cls: cls.name)
def test_fields_read_from_source_are_those_of_the_class(cls) -> None:
    members = dataclasses.fields(cls.load())
    assert list(cls.names) == [f.name for f in members]
    for member in members:
        read, real = cls.hint(member.name), field_hint(cls.load(), member)
        assert settable(read) == settable(real), member.name
        if settable(real):
            assert read == real, member.name


def test_a_run_file_is_read_without_torch_and_megatron(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + "parallel: {tensor_model_parallel_size: 2, sequence_parallel: true}\n")
    code = (
        "import sys; from megatron_ssu.config.load import load_run; run = load_run(sys.argv[1]);"
        "assert run.parallel.tensor == 2 and run.train.optimizer['lr'];"
        "assert not {'torch', 'megatron.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
