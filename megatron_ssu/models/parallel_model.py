"""A model on a mesh: what scoring, training and export start from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ssu.config.schema import RunConfig
from megatron_ssu.engine.mesh import Mesh, start_mesh, start_processes
from megatron_ssu.models.build import build_chunks, transformer_config
from megatron_ssu.models.family import padded_vocab
from megatron_ssu.models.hf_import import import_weights
from megatron_ssu.models.layout import Layout
from megatron_ssu.models.source import Source, open_source


@dataclass
class ParallelModel:
    """This rank's part of the model, with everything that says what it is."""

    run: RunConfig
    mesh: Mesh
    source: Source
    config: TransformerConfig
    chunks: list[GPTModel]
    layout: Layout


def open_model(run: RunConfig, source: Source | None = None, *, load: bool = True) -> ParallelModel:
    """Start the mesh, build this rank's model chunks and, with `load`, fill them from the Hugging Face directory."""
    source = source or open_source(run.model.path)
    start_processes(run.parallel.timeout_minutes)
    mesh = start_mesh(
        run.parallel.tensor,
        run.parallel.pipeline,
        run.parallel.virtual_pipeline,
        run.parallel.context,
        run.parallel.expert,
        run.train.seed,
        run.parallel.timeout_minutes,
    )
    return build_model(run, source, mesh, load=load)


def build_model(run: RunConfig, source: Source, mesh: Mesh, *, load: bool = True) -> ParallelModel:
    """This rank's model chunks on a mesh that has been started; with `load` their weights are the source's. Collective."""
    family, dims = source.family, source.dims
    config = transformer_config(run, family, source.hf, dims)
    chunks = build_chunks(run, family, source.hf, dims, config, mesh)
    vocab_rows = padded_vocab(dims.vocab, run.model.make_vocab_size_divisible_by)
    layout = Layout(family, dims, chunks, mesh.tensor_rank, mesh.tensor, vocab_rows)
    if load:
        import_weights(layout, source.checkpoint)
    return ParallelModel(run, mesh, source, config, chunks, layout)
