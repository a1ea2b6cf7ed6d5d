"""Memory, work and time of a run before it is submitted: from the run file and config.json, without a weight."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from math import ceil
from statistics import fmean
from typing import Any

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_ssu.config.checks.mesh import validate_mesh
from megatron_ssu.config.checks.model import validate_model
from megatron_ssu.config.checks.train import validate_batches, validate_regularize
from megatron_ssu.config.checks.unsupported import NEEDS_CUDA
from megatron_ssu.config.checks.values import at_least
from megatron_ssu.config.schema import RunConfig
from megatron_ssu.config.units import parse_size
from megatron_ssu.errors import UserError
from megatron_ssu.estimate import step_time as steps
from megatron_ssu.estimate.activations import (
    Kept,
    MicroBatch,
    Norms,
    Recompute,
    head_kept,
    in_flight,
    layer_kept,
    source_kept,
)
from megatron_ssu.estimate.compact import MatrixShield, matrix_shields
from megatron_ssu.estimate.hardware import Gpu
from megatron_ssu.estimate.host import HostBytes, exported_files, host_bytes
from megatron_ssu.estimate.weights import (
    Formats,
    Parameter,
    Shards,
    StateBytes,
    added_parameter,
    edge_parameters,
    layer_parameters,
    optimizer_bytes,
    state_bytes,
)
from megatron_ssu.methods.base import Method
from megatron_ssu.methods.registry import method_of
from megatron_ssu.models.build import transformer_config
from megatron_ssu.models.families import read_family
from megatron_ssu.models.family import Dims, Family, Scales
from megatron_ssu.models.hf_config import normalised
from megatron_ssu.models.hub import model_name
from megatron_ssu.models.limits import check_limits, check_method
from megatron_ssu.shield.shield_file import Shield

# Of FP8, whose weight-gradient GEMMs can leave frozen columns and rows out.
GATHERING_RECIPES = ("delayed", "tensorwise", "blockwise")


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage; bytes."""

    layers: int
    parameters: int  # elements of the weights
    trainable: int
    compact: int  # elements of the compact parameters beside them, padding included
    state: StateBytes
    activations: int  # of all micro-batches in flight
    recomputed: int  # brought back for a while

    @property
    def peak(self) -> int:
        """Activations are gone when the optimizer copies gradients."""
        return self.state.lasting + max(self.activations + self.recomputed, self.state.gradient_copies)


@dataclass(frozen=True)
class Estimate:
    """See the module docstring. `recompute`: bytes of activations on the fullest stage by setting."""

    model: str
    world: int
    mesh: steps.Mesh
    parameters: int  # of the whole model
    frozen: int
    linear_ratio: float  # frozen fraction of the linear layers' weights
    stages: tuple[Stage, ...]
    recompute: dict[str, int]
    sequences: int  # per step
    tokens: int  # per step
    work: steps.Work
    traffic: steps.Traffic
    optimizer_bytes: int  # read and written by the optimizer step of a rank of the fullest stage
    fp8: bool
    host: HostBytes
    added: int  # elements of the parameters that the method puts beside the model's

    @property
    def fullest(self) -> int:
        """The stage that needs most memory."""
        return max(range(len(self.stages)), key=lambda i: self.stages[i].peak)

    def time(self, gpu: Gpu, math: float = steps.MATH) -> steps.StepTime:
        return steps.step_time(self.work, self.traffic, self.optimizer_bytes, self.mesh, gpu, fp8=self.fp8, math=math)


def smallest_world(run: RunConfig) -> int:
    """Ranks of one replica."""
    return run.parallel.tensor * run.parallel.pipeline * run.parallel.context


def estimate(run: RunConfig, hf: dict[str, Any], world: int, *, shield: Shield | None = None, engine: bool) -> Estimate:
    """`hf`: the model's config.json. `shield`: the run's, where it is there already; else what its method expects to freeze
    counts as frozen. `engine`: Transformer Engine's layers with flash attention, as on GPUs; else megatron-core's own.

    Raises:
        UserError: mesh, model or batch would be refused on `world` ranks.
    """
    here, method = _as_checked_here(run), method_of(run)
    data = validate_mesh(here, world, shields=method.shields)
    for name in ("iterations", "micro_batch_size", "global_batch_size"):
        at_least(f"train.{name}", getattr(run.train, name), 1)
    validate_batches(run, data)
    validate_model(here, hf)
    if run.parallel.context > 1:
        raise UserError("parallel.context_parallel_size: estimate does not count context parallelism; set it to 1")
    family, dims = read_family(hf, run.model.path)
    scales = family.scales(normalised(hf))
    check_limits(run, family, dims, scales, transformer_engine=engine)
    check_method(method.name, dims, experts=method.experts)
    method.validate(run, list(family.matrices(dims)))
    validate_regularize(run)
    shields = matrix_shields(method, run, family, dims, shield)
    return _Counter(
        run,
        method,
        family,
        dims,
        data,
        shields,
        engine,
        transformer_config(here, family, hf, dims),
        scales=scales,
    ).count()


def _as_checked_here(run: RunConfig) -> RunConfig:
    """The run without what only a GPU machine can check."""
    run = deepcopy(run)
    for section, fields in (
        ("precision", run.precision.transformer),
        ("model", run.model.transformer),
        ("parallel", run.parallel.transformer),
        ("parallel.ddp", run.parallel.ddp),
    ):
        for name in list(fields):
            cuda = any(fnmatch(f"{section}.{name}", pattern) for pattern in NEEDS_CUDA)
            if cuda or section == "precision" or name == "attention_backend":
                del fields[name]
    return run


class _Counter:
    """The parts of an estimate."""

    def __init__(
        self,
        run: RunConfig,
        method: Method,
        family: Family,
        dims: Dims,
        data: int,
        shields: dict[str, MatrixShield],
        engine: bool,
        config: TransformerConfig,
        *,
        scales: Scales,
    ) -> None:
        self.scales = scales
        self.run, self.family, self.dims, self.engine, self.config = run, family, dims, engine, config
        parallel, train = run.parallel, run.train
        self.mesh = steps.Mesh(
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline or 1,
            data,
            train.global_batch_size // (train.micro_batch_size * data),
            parallel.expert,
            bool(parallel.ddp.get("overlap_grad_reduce")),
        )
        self.shards = Shards(data, parallel.tensor * data // parallel.expert)
        self._parameters: dict[int, list[Parameter]] = {}  # by stage
        self.method = method
        self.shields, self.regularize = shields, run.train.regularize
        weight = 2 if run.precision.dtype == "bf16" else 4
        self.formats = Formats(weight, 4 if parallel.ddp.get("grad_reduce_in_fp32", True) else weight)
        self.batch = MicroBatch(
            train.micro_batch_size, run.data.sequence_length, parallel.tensor, parallel.sequence_parallel, weight
        )

    def count(self) -> Estimate:
        mesh = self.mesh
        stages = tuple(self.stage(rank) for rank in range(mesh.pipeline))
        fullest = max(range(len(stages)), key=lambda i: stages[i].peak)
        matrices = list(self.family.matrices(self.dims))
        elements = sum(m.elements for m in matrices)
        linear = [m for m in matrices if m.scored]
        frozen = {name: shield.frozen for name, shield in self.shields.items()}
        all_frozen, linear_frozen = (
            sum(m.elements * frozen.get(m.name, 0.0) for m in members) for members in (matrices, linear)
        )
        tokens = self.run.train.global_batch_size * self.run.data.sequence_length
        kinds: tuple[Recompute, ...] = ("none", "selective", "full")
        busiest = max((self.work(rank) for rank in range(mesh.pipeline)), key=lambda w: w.total)
        return Estimate(
            model_name(self.run.model.path),
            mesh.world,
            mesh,
            elements,
            round(all_frozen),
            linear_frozen / sum(m.elements for m in linear),
            stages,
            {kind: sum(self.activations(fullest, kind)) for kind in kinds},
            self.run.train.global_batch_size,
            tokens,
            busiest,
            self.traffic(fullest),
            optimizer_bytes(self.parameters(fullest), self.formats, self.shards, l2=self.regularize.l2 > 0),
            self.fp8,
            host_bytes(
                mesh,
                self.parameters,
                self.copied,
                self.formats.weight,
                self.shards,
                background=self.run.checkpoint.async_save,
                files=exported_files(
                    self.family,
                    self.dims,
                    "BF16" if self.formats.weight == 2 else "F32",
                    parse_size(self.run.checkpoint.max_shard_size),
                ),
            ),
            sum(self.method.added_elements(matrix, None, 1) for matrix in linear),
        )

    def copied(self, rank: int, parameter: Parameter) -> bool:
        """Whether a stage's parameter is the copy of a tied embedding for the head."""
        embeddings = [entry.param for entry in self.family.edges if entry.kinds[0] == "embedding"]
        return self.dims.tied and rank > 0 and parameter.name in embeddings

    def layers(self, rank: int) -> list[int]:
        """Numbers of the layers of a stage, with all its virtual stages."""
        found: list[int] = []
        for chunk in [None] if self.mesh.virtual == 1 else list(range(self.mesh.virtual)):
            first = get_transformer_layer_offset(self.config, vp_stage=chunk, pp_rank=rank)
            count = get_num_layers_to_build(self.config, vp_stage=chunk, pp_rank=rank)
            found += range(first, first + count)
        return found

    def parameters(self, rank: int) -> list[Parameter]:
        """Of a rank of this stage."""
        if rank not in self._parameters:
            self._parameters[rank] = self._count_parameters(rank)
        return self._parameters[rank]

    def _count_parameters(self, rank: int) -> list[Parameter]:
        mesh = self.mesh
        found = [
            p
            for layer in self.layers(rank)
            for p in layer_parameters(self.family, self.dims, layer, mesh.tensor, self.shields, mesh.expert)
        ]
        added = sum(
            self.method.added_elements(matrix, entry.split, mesh.tensor)
            for layer in self.layers(rank)
            for entry, expert in self.family.entries(self.dims, layer)
            for matrix in entry.matrices(self.dims, layer, expert)
        )
        found += [added_parameter(added)] if added else []
        return found + list(
            edge_parameters(
                self.family,
                self.dims,
                mesh.tensor,
                self.run.model.make_vocab_size_divisible_by,
                self.shields,
                first=rank == 0,
                last=rank == mesh.pipeline - 1,
            )
        )

    def stage(self, rank: int) -> Stage:
        parameters = self.parameters(rank)
        stored, recomputed = self.activations(rank, self.recompute())
        return Stage(
            len(self.layers(rank)),
            sum(p.elements for p in parameters),
            round(sum(p.trainable for p in parameters)),
            round(sum(p.compact for p in parameters)),
            state_bytes(parameters, self.formats, self.shards, l2=self.regularize.l2 > 0, kl=self.regularize.kl > 0),
            stored,
            recomputed,
        )

    def recompute(self) -> Recompute:
        return self.run.model.transformer.get("recompute_granularity") or "none"

    def activations(self, rank: int, recompute: Recompute) -> tuple[int, int]:
        """Bytes stored by all micro-batches in flight, and those recomputed at a time."""
        mesh, fields = self.mesh, self.run.model.transformer
        layers, together = len(self.layers(rank)), 1
        whole, kept = self.mean_kept(rank, "none"), self.mean_kept(rank, recompute)
        stored = kept.stored * layers
        if recompute == "full":
            count = fields.get("recompute_num_layers") or 1
            if fields.get("recompute_method") == "block":  # so many are recomputed one by one, the others keep all
                count = min(count, layers)
                stored = kept.stored * count + whole.stored * (layers - count)
            else:  # so many are recomputed together
                stored, together = kept.stored * ceil(layers / count), count
        stored *= in_flight(rank, mesh.pipeline, mesh.virtual, mesh.micro_batches) / mesh.virtual
        if rank == mesh.pipeline - 1:
            padding = self.run.model.make_vocab_size_divisible_by
            capped = self.scales.logit_cap is not None
            stored += head_kept(self.dims, self.batch, padding, engine=self.engine, capped=capped)
            if self.regularize.kl:
                held = mesh.micro_batches if mesh.pipeline > 1 else 1
                stored += source_kept(self.dims, self.batch, padding, held=held)
        return round(stored), round(kept.recomputed * together)

    def mean_kept(self, rank: int, recompute: Recompute) -> Kept:
        """Of a layer of a stage; the mean over those with experts and those without."""
        kinds = {sparse: self.kept(recompute, sparse=sparse) for sparse in (False, True)}
        layers = [kinds[self.dims.sparse(layer)] for layer in self.layers(rank)]
        return Kept(fmean(k.stored for k in layers), max(k.recomputed for k in layers))

    def kept(self, recompute: Recompute, *, sparse: bool) -> Kept:
        return layer_kept(
            self.dims,
            self.batch,
            norms=Norms.of(self.family),
            engine=self.engine,
            recompute=recompute,
            modules=self.run.model.transformer.get("recompute_modules") or ("core_attn",),
            capped=self.scales.attention_cap is not None,
            sparse=sparse,
        )

    def work(self, rank: int) -> steps.Work:
        mesh, dims, parameters = self.mesh, self.dims, self.parameters(rank)
        tokens = self.batch.tokens * mesh.micro_batches
        linear = [p for p in parameters if p.linear]
        head = dims.vocab * dims.hidden / mesh.tensor if rank == mesh.pipeline - 1 else 0.0
        forward = 2 * tokens * sum(p.share * p.elements for p in linear)
        full = 3 * forward + 6 * tokens * head
        saved = gather = 0.0
        for p in linear:
            saved += 2 * tokens * p.share * (p.elements - self.gemm(p))
        for p in parameters:
            if p.name == self.head_name and p.training == "frozen":
                saved += 2 * tokens * head
        if self.gathers:
            # In FP8 rows of the transposed inputs, which leave the others unread.
            per_token = sum(
                p.share * (2 * p.written if self.fp8 else self.batch.itemsize * (p.read + p.written)) for p in linear
            )
            gather = tokens * per_token
        # Two GEMMs of s x s per head, of which flash attention leaves out the masked half; the backward pass has five.
        attention = 4 * tokens * dims.heads * dims.head / mesh.tensor * self.batch.length * len(self.layers(rank))
        attention *= 0.5 if self.engine else 1.0
        again = forward + attention if self.recompute() == "full" else 0.0
        source = forward + attention + 2 * tokens * head if self.regularize.kl else 0.0
        return steps.Work(full - saved, attention * 3.5, again, full, gather, source)

    def gemm(self, parameter: Parameter) -> float:
        """Elements of a linear weight's gradient that GEMMs compute."""
        if parameter.training == "compact" and not self.gathers:
            return parameter.elements
        return parameter.gemm

    @property
    def fp8(self) -> bool:
        return bool(self.run.precision.transformer.get("fp8"))

    @property
    def gathers(self) -> bool:
        """Whether weight-gradient GEMMs leave frozen columns and rows out."""
        fields = self.run.precision.transformer
        recipe = fields.get("fp8_recipe") or "delayed"
        return not fields.get("fp4") and (not self.fp8 or getattr(recipe, "value", recipe) in GATHERING_RECIPES)

    @property
    def head_name(self) -> str:
        """megatron's name of the weight that the head multiplies by."""
        kind = "embedding" if self.dims.tied else "head"
        return next(entry.param for entry in self.family.edges if entry.kinds[0] == kind)

    def traffic(self, rank: int) -> steps.Traffic:
        """All-reduces count twice what an all-gather or reduce-scatter does."""
        mesh, batch = self.mesh, self.batch
        hidden = batch.tokens * self.dims.hidden * batch.itemsize
        tensor = 0.0
        if mesh.tensor > 1:
            once = hidden * (mesh.tensor - 1) / mesh.tensor
            # Two blocks per layer, each with an all-reduce forward and one backward; sequence parallelism gathers its
            # inputs once more for the weight gradients.
            times = 4 * 2 + (2 if batch.sequence_parallel else 0)
            times += 4 if self.regularize.kl else 0  # the source's forward pass
            tensor = once * times * len(self.layers(rank)) * mesh.micro_batches
        pipeline = 0.0
        if mesh.pipeline > 1:
            passes = 3 if self.regularize.kl else 2
            pipeline = passes * hidden / batch.split * mesh.virtual * mesh.micro_batches
        expert = 0.0
        if self.dims.experts is not None:  # every token goes to its experts and comes back, forward and backward
            sparse = sum(self.dims.sparse(layer) for layer in self.layers(rank))
            away = (mesh.expert - 1) / mesh.expert * self.dims.experts.active
            passes = 6 if self.regularize.kl else 4
            expert = passes * away * hidden / batch.split * sparse * mesh.micro_batches
        data = sum(
            (self.shards.of(p) - 1) / self.shards.of(p) * p.trained * (self.formats.gradient + self.formats.weight)
            for p in self.parameters(rank)
        )
        return steps.Traffic(tensor, pipeline, data, expert)
