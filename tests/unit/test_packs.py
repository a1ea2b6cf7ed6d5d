"""Language packs: what moved as a file, put on and taken off bit for bit, stacked where nothing is shared."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megatron_ssu import cli
from megatron_ssu.errors import UserError
from megatron_ssu.models.fingerprint import model_fingerprint
from megatron_ssu.models.matrix import Matrix
from megatron_ssu.packs.apply import apply, remove, stack
from megatron_ssu.packs.create import create
from megatron_ssu.packs.verify import verify_packs
from megatron_ssu.shield import pack_file
from megatron_ssu.shield.mask import Mask
from megatron_ssu.shield.pack_file import Pack, shared_elements
from megatron_ssu.shield.plan import PlanOptions, plan_shield
from megatron_ssu.shield.reserved import Reserved
from megatron_ssu.shield.select import ProtectRule
from megatron_ssu.shield.shield_file import Shield
from tests.unit.samples import matrices, scores_of, weights_of, write_hf

INT = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
Q0, DOWN1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass
class World:
    """A source, and adaptations of it that move a third each of every matrix: their own columns, rows of embedding and head,
    elements of norms."""

    folder: Path
    weights: dict[str, torch.Tensor]
    shards: int

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def adapt(self, name: str, part: int, shards: int | None = None, granularity: str = "column") -> Path:
        """Writes the adapted directory and `NAME.shield`."""
        masks, moved = {}, {n: w.clone() for n, w in self.weights.items()}
        for matrix in matrices().values():
            if matrix.name not in moved:
                continue
            by = granularity if matrix.scored else "row" if len(matrix.shape) == 2 else "element"
            frozen = np.arange(Mask.constant(by, matrix.shape, False).units) % 3 != part
            masks[matrix.name] = Mask.of(by, matrix.shape, frozen)
            trains = ~torch.from_numpy(masks[matrix.name].full().copy())
            moved[matrix.name].view(INT[moved[matrix.name].dtype])[trains] += 1 + part
        members = {n: m for n, m in matrices().items() if n in masks}
        Shield("ssu", "source", model_fingerprint(self.source), members, masks).save(self.folder / f"{name}.shield")
        write_hf(self.folder / name, moved, shards or self.shards)
        (self.folder / name / "megatron-ssu.json").write_text(f'{{"name": "{name}"}}')
        (self.folder / name / "README.md").write_text("a card")
        (self.folder / name / "tokenizer.json").write_text("{}")
        return self.folder / name

    def pack(self, name: str, part: int, **how) -> Pack:
        return create(self.source, self.adapt(name, part, **how), "a" * 64, self.folder / f"{name}.pack")


def make_world(folder: Path, dtype=torch.bfloat16, shards=1, tied=False) -> World:
    weights = {n: w.to(dtype) for n, w in weights_of(matrices()).items() if not (tied and n == "lm_head.weight")}
    write_hf(folder / "source", weights, shards)
    (folder / "source" / "tokenizer.json").write_text("{}")
    return World(folder, weights, shards)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.mark.parametrize("chunk", [1 << 24, 64])
@pytest.mark.parametrize("granularity", ["column", "row", "element"])
@pytest.mark.parametrize(
    ("dtype", "tied", "shards", "adapted"),
    [(torch.bfloat16, False, 1, 3), (torch.float32, True, 3, 1), (torch.bfloat16, True, 4, 4)],
)
def test_round_trips_give_every_file_bit_for_bit(
    tmp_path, monkeypatch, dtype, tied, shards, adapted, granularity, chunk
):
    monkeypatch.setattr(pack_file, "_CHUNK", chunk)
    world = make_world(tmp_path, dtype, shards, tied)
    pack = world.pack("adapted", 0, shards=adapted, granularity=granularity)
    assert {pack.moved[n].granularity for n in (Q0, DOWN1)} == {granularity}
    assert pack.moved[EMBED].granularity == "row"
    source, target = contents(world.source), contents(tmp_path / "adapted")
    shutil.rmtree(tmp_path / "adapted")
    apply(world.source, Pack(pack.path), tmp_path / "made")
    assert contents(tmp_path / "made") == target
    assert remove(tmp_path / "made", Pack(pack.path), tmp_path / "back")
    assert contents(tmp_path / "back") == source
    assert contents(world.source) == source


def test_a_pack_is_as_large_as_what_moved(tmp_path):
    world = make_world(tmp_path)
    pack = world.pack("adapted", 0)
    xor = sum(pack.file.get(f"xor/{name}").nbytes for name in pack.moved)
    moved = sum(int((~Mask.of(*case).full()).sum()) for case in masks_of(world, "adapted"))
    assert pack.elements == moved and xor == 2 * moved
    few = {n: w.clone() for n, w in world.weights.items()}
    few[Q0].view(torch.int16)[[3, 5], [4, 17]] ^= 1
    write_hf(tmp_path / "few", few)
    found = create(world.source, tmp_path / "few", "a" * 64, tmp_path / "few.pack")
    assert (found.elements, list(found.moved)) == (2, [Q0]) and found.moved[Q0].granularity == "element"


def masks_of(world: World, name: str):
    from megatron_ssu.shield.shield_file import load_shield

    shield = load_shield(world.folder / f"{name}.shield")
    return [(mask.granularity, mask.shape, mask.bits()) for mask in shield.masks.values()]


def test_stacked_packs_are_found_bit_for_bit_and_come_off_in_any_order(tmp_path):
    world = make_world(tmp_path, shards=2)
    a, b = world.pack("a", 0), world.pack("b", 1)
    assert not shared_elements(a, b)
    stack(world.source, [a, b], tmp_path / "both")
    stack(world.source, [b, a], tmp_path / "again")
    both = contents(tmp_path / "both")
    record = json.loads(both.pop("megatron-ssu.json"))
    assert [entry["digest"] for entry in record["packs"]] == [a.digest, b.digest]
    assert both == {n: c for n, c in contents(tmp_path / "again").items() if n != "megatron-ssu.json"}
    report = verify_packs(world.source, tmp_path / "both", [b, a])
    assert report.status == 0 and [r.elements for r in report.packs[:2]] == [b.elements, a.elements]
    assert sum(r.elements for r in report.packs) == sum(w.numel() for w in world.weights.values())
    for first, other, left in ((a, b, "b"), (b, a, "a")):
        assert not remove(tmp_path / "both", first, tmp_path / f"only-{left}")
        assert verify_packs(world.source, tmp_path / f"only-{left}", [other]).status == 0
        entries = json.loads((tmp_path / f"only-{left}" / "megatron-ssu.json").read_text())["packs"]
        assert [entry["name"] for entry in entries] == [left]
        weights = {n: c for n, c in contents(tmp_path / left).items() if n.endswith(".safetensors")}
        assert weights == {n: c for n, c in contents(tmp_path / f"only-{left}").items() if n in weights}
        remove(tmp_path / f"only-{left}", other, tmp_path / f"none-{left}")
        assert contents(tmp_path / f"none-{left}") == contents(world.source)


@pytest.mark.parametrize("where", ["pack", "rest"])
def test_verify_finds_one_wrong_bit(tmp_path, where):
    world = make_world(tmp_path)
    packs = [world.pack("a", 0), world.pack("b", 1)]
    stack(world.source, packs, tmp_path / "both")
    weights = tmp_path / "both" / "model.safetensors"
    checkpoint = pack_file_offset(tmp_path / "both", Q0)
    column = {"pack": 3, "rest": 2}[where]
    bits = bytearray(weights.read_bytes())
    bits[checkpoint + 2 * column] ^= 1
    weights.write_bytes(bits)
    report = verify_packs(world.source, tmp_path / "both", packs)
    assert report.status == 1
    assert [r.wrong for r in report.packs] == [where == "pack", 0, where == "rest"]
    text = io.StringIO()
    report.render(Console(file=text, width=160))
    assert Q0 in text.getvalue() and "FAILED" in text.getvalue()
    if where == "pack":
        out = tmp_path / "out"
        refused(r"a\.pack was not in it as it is: .*q_proj", lambda: remove(tmp_path / "both", packs[0], out), tmp_path)


def pack_file_offset(directory: Path, name: str) -> int:
    from megatron_ssu.models.hf_files import HFCheckpoint

    return HFCheckpoint(directory).entry(name).start


def refused(match: str, call, folder: Path) -> None:
    before = sorted(str(p) for p in folder.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert sorted(str(p) for p in folder.rglob("*")) == before, "something was written"


def test_what_does_not_fit_is_refused_in_one_line_and_nothing_written(tmp_path):
    world = make_world(tmp_path)
    a, b, overlapping = world.pack("a", 0), world.pack("b", 1), world.pack("c", 0)
    out = tmp_path / "out"
    apply(world.source, a, tmp_path / "with-a")
    chained = create(tmp_path / "with-a", tmp_path / "b", "a" * 64, tmp_path / "chained.pack")
    for match, call in (
        (r"b: is not the model that .*a\.pack was made from \(source\): other weights", lambda: apply(tmp_path / "b", a, out)),
        (r"with-a: has .*a\.pack in it already", lambda: apply(tmp_path / "with-a", a, out)),
        (r"source: is the model that .*a\.pack was made from; there", lambda: remove(world.source, a, out)),
        (r"b: .*a\.pack was not in it as it is", lambda: remove(tmp_path / "b", a, out)),
        (r"with-a exists already", lambda: apply(world.source, a, tmp_path / "with-a")),
        (r"c\.pack: moves [\d,]+ weights that .*a\.pack moves too, in \d+ tensors, such as .*shield\.reserve", lambda: stack(
            world.source, [a, overlapping], out)),
        (r"a\.pack: the same pack", lambda: stack(world.source, [a, a], out)),
        (r"chained\.pack: made from another model \(with-a\) than .*b\.pack \(source\)", lambda: stack(
            world.source, [b, chained], out)),
        (r"with-a: is not the model that .*a\.pack was made from", lambda: stack(tmp_path / "with-a", [a, b], out)),
        (r"source: every weight is as in", lambda: create(world.source, world.source, "a" * 64, tmp_path / "d.pack")),
        (r"a\.pack: already exists", lambda: create(world.source, tmp_path / "a", "a" * 64, a.path)),
        (r"none\.pack: no such pack file", lambda: Pack(tmp_path / "none.pack")),
        (r"a\.shield: not a pack file of this version", lambda: Pack(tmp_path / "a.shield")),
    ):  # fmt: skip
        refused(match, call, tmp_path)


def test_weights_that_the_fingerprint_does_not_read_count_too(tmp_path):
    """A source that differs in one bit between what is sampled."""
    members = matrices(hidden=256, ffn=512)
    weights = weights_of(members)
    write_hf(tmp_path / "source", weights)
    moved = {n: w.clone() for n, w in weights.items()}
    moved[EMBED].view(torch.int16)[:, 1] += 1
    write_hf(tmp_path / "adapted", moved)
    pack = create(tmp_path / "source", tmp_path / "adapted", "a" * 64, tmp_path / "a.pack")
    name = "model.layers.0.mlp.gate_proj.weight"
    other = {n: w.clone() for n, w in weights.items()}
    other[name].view(torch.int16).view(-1)[5000] ^= 1
    write_hf(tmp_path / "other", other)
    assert model_fingerprint(tmp_path / "other") == model_fingerprint(tmp_path / "source")
    refused(
        "other: differs from the model .* leaves alone",
        lambda: apply(tmp_path / "other", pack, tmp_path / "o"),
        tmp_path,
    )


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9, 0.999])
def test_a_damaged_file_is_refused_and_nothing_written(tmp_path, place):
    world = make_world(tmp_path)
    pack = world.pack("a", 0)
    apply(world.source, pack, tmp_path / "with-a")
    content = bytearray(pack.path.read_bytes())
    content[int(place * len(content))] ^= 4
    pack.path.write_bytes(content)
    call, model = (apply, "source") if place < 0.99 else (remove, "with-a")  # the last bytes are the source's
    refused(
        r"a\.pack: (the pack file|not a pack file)",
        lambda: call(tmp_path / model, Pack(pack.path), tmp_path / "o"),
        tmp_path,
    )
    pack.path.write_bytes(content[:-9])
    refused(r"a\.pack: not a pack file", lambda: Pack(pack.path), tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    pack = world.pack("a", 0)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_ssu.packs.weights.os.fsync", full)
    refused(
        "o: cannot be written: No space left on device", lambda: apply(world.source, pack, tmp_path / "o"), tmp_path
    )


def test_packs_that_change_a_file_differently_do_not_stack(tmp_path):
    world = make_world(tmp_path)
    for name, part in (("a", 0), ("b", 1)):
        (world.adapt(name, part) / "tokenizer.json").write_text(f'{{"of": "{name}"}}')
    packs = [create(world.source, tmp_path / n, "a" * 64, tmp_path / f"{n}.pack") for n in "ab"]
    refused(
        r"b\.pack: has another tokenizer\.json than .*a\.pack",
        lambda: stack(world.source, packs, tmp_path / "o"),
        tmp_path,
    )


@pytest.mark.parametrize("granularity", ["column", "row", "element"])
def test_a_shield_that_reserves_a_pack_leaves_all_that_it_moves(tmp_path, granularity):
    world = make_world(tmp_path)
    pack = world.pack("a", 0)
    scores = scores_of(matrices(), world.weights)
    options = PlanOptions(granularity=granularity, ratio=0.6, reserve=[str(pack.path)])
    shield = plan_shield(
        scores, options, method="ssu", weights=world.weights.__getitem__, frozen_rows={EMBED: ((36, 20), [1])}
    )
    assert shield.plan["reserve"] == [pack.digest]
    for name, moved in pack.moved.items():
        where = ~pack.frozen(name).full()
        assert shield.masks[name].full()[where].all(), name
        assert moved.elements == where.sum()
    if granularity == "column":  # a third is reserved, the rest of the 60 % are the best of the others
        assert shield.masks[Q0].frozen_units == 12
        values = np.where(np.arange(20) % 3 == 0, np.inf, scores.column("wanda", Q0))
        assert set(np.flatnonzero(shield.masks[Q0].columns())) == set(np.argsort(-values, kind="stable")[:12])
    assert shield.masks[EMBED].rows()[1] and shield.masks[EMBED].frozen_units == 13
    rule = ProtectRule("*.q_proj.weight", "trainable")
    with pytest.raises(UserError, match=r"shield\.reserve: .*a\.pack: moves weights of .*q_proj.*shield\.protect"):
        plan_shield(scores, replace(options, protect=(rule,)), method="ssu", weights=world.weights.__getitem__)


def test_rows_of_a_fused_tensor_are_reserved(tmp_path):
    world = make_world(tmp_path)
    pack = world.pack("a", 1, granularity="row")
    window = Matrix(f"{Q0}[8:16]", (8, 20), 0, "q_proj")
    found = Reserved([pack]).units(window, "row")
    assert list(np.flatnonzero(found)) == [2, 5]  # rows 10 and 13
    with pytest.raises(UserError, match=r"a\.pack: .*is \[8, 20\], the model's is \[9, 20\]"):
        Reserved([pack]).units(replace(window, shape=(9, 20)), "row")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


def test_the_commands(tmp_path, capfd):
    world = make_world(tmp_path)
    for name, part in (("a", 0), ("b", 1)):
        adapted = world.adapt(name, part)
        both = ("--source", world.source, "--adapted", adapted, "--shield", tmp_path / f"{name}.shield")
        assert run("pack", "create", *both, "--output", tmp_path / f"{name}.pack") == 0
    assert "weights moved (3" in capfd.readouterr().out
    packs = [tmp_path / "a.pack", tmp_path / "b.pack"]
    assert run("pack", "apply", world.source, packs[0], "--output", tmp_path / "with-a") == 0
    assert run("pack", "remove", tmp_path / "with-a", packs[0], "--output", tmp_path / "without") == 0
    assert "without: source, bit for bit" in capfd.readouterr().out
    assert run("pack", "stack", *packs, "--source", world.source, "--output", tmp_path / "both") == 0
    both = ("--source", world.source, "--adapted", tmp_path / "both")
    assert run("verify", *both, "--packs", *packs, "--json", tmp_path / "v.json") == 0
    assert json.loads((tmp_path / "v.json").read_text())["ok"]
    capfd.readouterr()
    assert run("verify", *both, "--packs", packs[0]) == 1
    assert "no pack touched" not in capfd.readouterr().out
    assert run("pack", "stack", packs[0], "--source", world.source, "--output", tmp_path / "one") == 2
    assert "needs two packs or more" in capfd.readouterr().err
    wrong = ("--source", world.source, "--adapted", tmp_path / "b", "--shield", tmp_path / "a.shield")
    assert run("pack", "create", *wrong, "--output", tmp_path / "c.pack") == 2
    assert "not packed: FAILED: frozen bits moved" in capfd.readouterr().err
    assert not (tmp_path / "c.pack").exists()
