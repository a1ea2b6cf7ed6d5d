"""A training loop of megatron-core's own parts, with a shield: source weights that must stay are not moved.

    python examples/library/stock_loop.py
    torchrun --nproc-per-node 2 examples/library/stock_loop.py --tensor 2     # tensor parallel
    torchrun --nproc-per-node 2 examples/library/stock_loop.py                # data parallel

A small random Llama is the source model. Of what a loop without a shield does, nothing is left out; the lines that begin with
`ssu.` or `shielded.` are the shield's. Runs on CPU, and on GPUs where CUDA is.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_ssu as ssu

VOCAB, LENGTH, MICRO_BATCH, MICRO_BATCHES = 96, 32, 4, 2
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}


def keep(weight):
    """Initialisation of a weight that is loaded afterwards."""
    return weight


def build(hf: dict, tensor: int):
    """megatron-core's GPTModel of a Hugging Face config, with the stock local layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=keep,
        output_layer_init_method=keep,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tensor,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return config, model.cuda()


def forward_step(batches, model):
    """A micro-batch of random tokens, and the mean loss over its next tokens."""
    tokens = next(batches).cuda()
    positions = torch.arange(LENGTH, device=tokens.device).expand(MICRO_BATCH, -1)
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return losses, lambda loss: (loss.float().mean(), {"loss": loss.detach().float().mean()})


def random_tokens(rank: int):
    """Micro-batches of a data-parallel rank, int64 [b, s + 1], without end."""
    draw = torch.Generator().manual_seed(rank)
    while True:
        yield torch.randint(0, VOCAB, (MICRO_BATCH, LENGTH + 1), generator=draw)


def train(model_dir: Path, target: Path, tensor: int, steps: int) -> ssu.VerifyReport:
    """Score and shield the source model, train it, write it to `target`, and compare the two."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from transformers import AutoConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    hf = AutoConfig.from_pretrained(model_dir).to_dict()

    config, model = build(hf, tensor)
    ssu.load_weights(model, model_dir)
    scores = ssu.score(model_dir, scores=["magnitude"], chunks=model)  # "wanda" needs source chats: calibration=...
    shield = ssu.plan(scores, ratio=0.5, special_tokens=False)  # the random model has no tokenizer
    shielded = ssu.apply(model, shield, model_dir)

    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, use_distributed_optimizer=True), [ddp])
    config.finalize_model_grads_func = finalize_model_grads
    batches = random_tokens(parallel_state.get_data_parallel_rank())
    for step in range(steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=ddp,
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        if dist.get_rank() == 0:
            loss = sum(float(report["loss"]) for report in reports) / len(reports)
            print(f"step {step + 1}: loss {loss:.4f}, gradient norm {norm:.4f}")

    shielded.write()  # what the last step made, into the weights
    shielded.export(model_dir, target)
    return ssu.verify(model_dir, target, shield)


def main() -> None:
    """Make a source model, train under a shield, and say what moved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    with nullcontext() if torch.cuda.is_available() else ssu.cpu_backend(), tempfile.TemporaryDirectory() as own:
        start_processes()
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        source, target = Path(folder[0]) / "source", Path(folder[0]) / "adapted"
        if dist.get_rank() == 0:
            make_source(source)
        dist.barrier()
        report = train(source, target, options.tensor, options.steps)
        if dist.get_rank() == 0:
            frozen, free = report.totals("column"), report.totals("none")
            print(
                f"{report.verdict}: {frozen['moved_frozen']} of {frozen['frozen']} frozen columns moved, "
                f"{frozen['moved_trainable']} of {frozen['trainable']} trainable ones, {free['moved_trainable']} other weights"
            )
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(report.status)


def start_processes() -> None:
    """torchrun's process group, or one of this process alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def make_source(directory: Path) -> None:
    """A small random Llama as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(directory)


if __name__ == "__main__":
    main()
