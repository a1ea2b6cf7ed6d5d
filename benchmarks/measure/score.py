"""What scoring costs over a forward-only pass of megatron-core, and what planning a 13B model costs."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import interleave, milliseconds, show, write_json
from rich.console import Console

SHAPE_13B = {
    "model_type": "olmo2",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
}


def run(options: argparse.Namespace) -> None:
    """Measure what the command line asks for, and print it."""
    if options.plan_only:
        plan_once(Path(options.plan_only))
        return
    console = Console(width=110)
    results = score(options, console) + plan(console)
    if options.json:
        write_json(options.json, {k: v for k, v in vars(options).items() if k not in ("json", "plan_only")}, results)
    limits = {("forward and statistics", "ratio"): 1.10, ("plan 13B", "seconds"): 5.0, ("plan 13B", "peak_gib"): 1.0}
    over = [
        f"{what}: {key}" for r in results for (what, key), most in limits.items() if r["what"] == what and r[key] > most
    ]
    sys.exit(f"over the limit: {', '.join(over)}" if over else 0)


def make_model(options: argparse.Namespace, directory: Path) -> Path:
    """A random OLMo-2 of the size asked for."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "olmo2",
        vocab_size=4096,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.length,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(directory)
    return directory


def score(options: argparse.Namespace, console: Console) -> list[dict]:
    """Forward only, with statistics, and the fisher score's forward and backward, over the same tokens in turn."""
    from megatron_ssu.config.schema import CheckpointSection, ModelSection, PrecisionSection, RunConfig
    from megatron_ssu.data.calibration import Calibration
    from megatron_ssu.models.parallel_model import open_model
    from megatron_ssu.ops import kernels
    from megatron_ssu.scoring.calibration_pass import calibration_pass, micro_batches
    from megatron_ssu.scoring.input_statistics import InputStatistics
    from megatron_ssu.scoring.squared_gradients import SquaredGradients

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options, Path(folder) / "model")
        run = RunConfig(
            model=ModelSection(path=str(model)),
            checkpoint=CheckpointSection(directory=folder),
            precision=PrecisionSection(dtype=options.dtype),
        )
        session = open_model(run)
    ids = torch.randint(0, 4096, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    data = Calibration(ids, everywhere, "", options.rows, None)
    batches, single = micro_batches(data, session, options.micro_batch_size), micro_batches(data, session, 1)

    def scored() -> None:
        statistics = InputStatistics(session)
        calibration_pass(session, batches, statistics)
        statistics.close()
        statistics.merge(options.rows)

    def fisher() -> None:
        gradients = SquaredGradients(session, "fisher")
        calibration_pass(session, single, None, backward=True)
        gradients.close()
        gradients.entries(options.rows)

    variants = {
        "forward only": lambda: calibration_pass(session, batches, None),
        "forward and statistics": scored,
        "forward and backward, fisher": fisher,
    }
    timings = interleave(variants, options.rounds)
    plain = timings["forward only"].median
    ids_total = ids.numel()
    rows = [
        (name, milliseconds(t), f"{t.median / plain:.3f}", f"{ids_total / t.median:,.0f}")
        for name, t in timings.items()
    ]
    title = (
        f"{ids_total} tokens, {options.layers} layers of {options.hidden}, {options.dtype}, "
        f"sums by {kernels.backend(next(session.chunks[0].parameters()).device)}"
    )
    show(console, title, ("pass", "time", "ratio", "tokens/s"), rows)
    return [{"what": name, "ratio": t.median / plain, "timing": t} for name, t in timings.items()]


def plan(console: Console) -> list[dict]:
    """Plan a made-up scores file of 13B's shapes in a process of its own: seconds and peak memory."""
    from megatron_ssu.models.families import family_of
    from megatron_ssu.models.family import Dims
    from megatron_ssu.scoring.scores_file import Scores

    draw = np.random.default_rng(0)
    matrices = {m.name: m for m in family_of(SHAPE_13B).matrices(Dims.from_hf(SHAPE_13B))}
    tensors = {}
    for name, m in matrices.items():
        if m.scored:
            tensors[f"wanda/column/{name}"] = draw.lognormal(size=m.shape[1])
            tensors[f"wanda/row/{name}"] = draw.lognormal(size=m.shape[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.safetensors"
        Scores("made-up-13b", "0" * 64, matrices, tensors, ["wanda"]).save(path)
        command = [sys.executable, sys.argv[0], "--plan-only", str(path)]
        made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [(k, f"{v['seconds']:.2f} s", f"{v['peak_gib']:.2f} GiB", f"{v['bytes']:,}") for k, v in made.items()]
    show(
        console, f"plan a 13B model ({len(tensors) // 2} matrices)", ("by", "time", "peak memory", "shield bytes"), rows
    )
    worst = max(v["seconds"] for v in made.values())
    return [{"what": "plan 13B", "seconds": worst, "peak_gib": max(v["peak_gib"] for v in made.values()), "by": made}]


def plan_once(path: Path) -> None:
    """In the child: read, plan and write, columns and rows, uniform and layerwise."""
    from megatron_ssu.scoring.scores_file import Scores
    from megatron_ssu.shield.plan import PlanOptions, plan_shield

    found = {}
    for granularity in ("column", "row"):
        for budget in ("uniform", "layerwise"):
            begin = time.perf_counter()
            options = PlanOptions(granularity=granularity, budget=budget, floor=0.1, ceiling=0.9)
            shield = plan_shield(Scores.load(path), options, method="ssu")
            target = path.with_name(f"{granularity}-{budget}.safetensors")
            shield.save(target)
            found[f"{granularity}, {budget}"] = {
                "seconds": time.perf_counter() - begin,
                "peak_gib": peak_gib(),
                "bytes": target.stat().st_size,
            }
    sys.stdout.write(json.dumps(found))


def peak_gib() -> float:
    """The most memory this process held; ru_maxrss would count the parent that it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(text for text in status.read_text().splitlines() if text.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
