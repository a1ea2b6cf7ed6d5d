"""Convert between a Hugging Face directory, a run directory and a checkpoint of Megatron-LM or Megatron-Bridge, offline.

  python tools/checkpoint/convert.py --loader hf --load-dir models/OLMo-2-1124-7B --saver core --save-dir ckpt/olmo2
  python tools/checkpoint/convert.py --loader core --load-dir runs/amharic --saver hf --save-dir models/again
  python tools/checkpoint/convert.py --loader core --load-dir runs/amharic --saver megatron --save-dir ckpt/megatron
  python tools/checkpoint/convert.py --loader megatron --load-dir ckpt/megatron --hf-dir models/Qwen3-8B --saver hf \\
      --save-dir models/again

The core side is a run directory: run.yaml and checkpoints/iter_*. The megatron side is a directory with
latest_checkpointed_iteration.txt, in torch_dist format, of weights alone; --hf-dir names config and tokenizer of one that is
read. Checkpoints fit every mesh, so no target sizes need to be named. A model that one process cannot hold is converted under
torchrun, on a mesh given as KEY=VALUE, such as parallel.tensor_model_parallel_size=8. Training needs no conversion: it starts
from a Hugging Face directory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from rich.console import Console

from megatron_ssu.errors import UserError
from megatron_ssu.io.output import LossyOutput, open_closed_streams, print_error, settle

if TYPE_CHECKING:
    from megatron_ssu.config.schema import RunConfig


def to_core(options: argparse.Namespace, console: Console) -> None:
    """Hugging Face directory -> run directory with one checkpoint of the weights, iteration 0."""
    from megatron_ssu.commands.start import check_run
    from megatron_ssu.config.load import save_run
    from megatron_ssu.engine.mesh import start_processes
    from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
    from megatron_ssu.methods.registry import method_of
    from megatron_ssu.models.families import family_of
    from megatron_ssu.models.parallel_model import open_model
    from megatron_ssu.train.checkpoints import Checkpoints
    from megatron_ssu.train.run_lock import held

    target = Path(options.save_dir)
    record = target / "run.yaml"

    def refuse_run() -> None:
        if record.exists():
            raise UserError(f"{target}: holds a run already and is not overwritten; name another directory")

    start_processes()
    run = on_all_ranks(lambda: _core_run(options))
    source = on_all_ranks(lambda: check_run(run, method_of(run), training=False))
    with held(target, "convert"):
        on_rank_zero(refuse_run)
        path = Checkpoints(target).save_weights(open_model(run, source))
        on_rank_zero(lambda: save_run(run, record))
    console.print(f"{path}: {family_of(source.hf).name}, written", highlight=False)


def _core_run(options: argparse.Namespace) -> RunConfig:
    """The settings of the run directory, read as strictly as any run file."""
    from megatron_ssu.config.load import load_run, save_run
    from megatron_ssu.config.schema import CheckpointSection, MethodSection, ModelSection, RunConfig

    run = RunConfig(
        model=ModelSection(path=options.load_dir),
        checkpoint=CheckpointSection(directory=options.save_dir),
        method=MethodSection(name="none"),
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.yaml"
            save_run(run, file)
            return load_run(file, [f"precision.dtype={options.dtype}", *options.overrides])
    except OSError as error:
        raise UserError(f"no temporary folder can be written ({error.strerror}); set TMPDIR") from error


def to_hf(options: argparse.Namespace, console: Console) -> None:
    """A run directory's checkpoint -> Hugging Face directory."""
    from megatron_ssu.commands.export import export
    from megatron_ssu.methods.registry import read_run

    run = read_run(Path(options.load_dir) / "run.yaml", options.overrides)
    export(run, Path(options.save_dir), options.iteration, console)


def to_megatron(options: argparse.Namespace, console: Console) -> None:
    """Hugging Face directory, or a run directory's checkpoint -> a checkpoint for Megatron-LM."""
    from megatron_ssu.commands.export import load_exported
    from megatron_ssu.commands.start import start
    from megatron_ssu.engine.mesh import start_processes
    from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
    from megatron_ssu.io.atomic import check_target
    from megatron_ssu.methods.registry import method_of, read_run
    from megatron_ssu.models.parallel_model import open_model
    from megatron_ssu.train.megatron_checkpoint import write_release

    start_processes()
    target, iteration = on_rank_zero(lambda: check_target(options.save_dir, "--save-dir")), 0
    if options.loader == "hf":
        run = on_all_ranks(lambda: _core_run(options))
        session = open_model(run, start(run, method_of(run), training=False, writing=False))
    else:
        run = on_all_ranks(lambda: read_run(Path(options.load_dir) / "run.yaml", options.overrides))
        session, iteration = load_exported(run, options.iteration)
    path = write_release(session, target, iteration=iteration)
    console.print(f"{path}: written", highlight=False)


def from_megatron(options: argparse.Namespace, console: Console) -> None:
    """A checkpoint of Megatron-LM -> Hugging Face directory, with config and tokenizer of --hf-dir."""
    from megatron_ssu.commands.megatron_source import convert
    from megatron_ssu.commands.start import check_settings
    from megatron_ssu.engine.mesh import start_processes, world_size
    from megatron_ssu.engine.ranks import on_all_ranks, on_rank_zero
    from megatron_ssu.io.atomic import check_target
    from megatron_ssu.methods.registry import method_of
    from megatron_ssu.models.hf_config import read_hf_config
    from megatron_ssu.train.megatron_checkpoint import newest

    start_processes()
    options.load_dir, checkpoint = options.hf_dir, options.load_dir
    run = on_all_ranks(lambda: _core_run(options))
    target = on_rank_zero(lambda: check_target(options.save_dir, "--save-dir"))
    folder = on_rank_zero(lambda: newest(checkpoint, "--load-dir"))

    def check() -> None:
        hf = read_hf_config(options.hf_dir, "--hf-dir")
        check_settings(run, method_of(run), hf, world_size(), training=False, writing=False)

    on_all_ranks(check)
    convert(run, folder, target, {"megatron_checkpoint": str(folder)})
    console.print(f"{target}: written", highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=("hf", "core", "megatron"), required=True, help="format of --load-dir")
    parser.add_argument("--saver", choices=("hf", "core", "megatron"), required=True, help="format of --save-dir")
    parser.add_argument("--load-dir", required=True, metavar="DIR")
    parser.add_argument("--save-dir", required=True, metavar="DIR", help="must not exist")
    parser.add_argument("--hf-dir", metavar="DIR", help="config and tokenizer of a megatron --load-dir")
    parser.add_argument("--iteration", type=int, metavar="N", help="checkpoint to read (default: the newest)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the core weights (default bf16)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as parallel.tensor_model_parallel_size=8"
    )
    options = parser.parse_args()
    if options.loader == options.saver:
        parser.error("--loader and --saver are the same format")
    if options.loader == "megatron" and (options.saver != "hf" or options.hf_dir is None):
        parser.error("--loader megatron goes with --saver hf and --hf-dir")
    return options


def main() -> int:
    """Convert, and return the exit status."""
    options = parse()
    warnings.filterwarnings("ignore")  # those of libraries
    from megatron_ssu.engine.mesh import stop_processes

    open_closed_streams()
    first, status = os.environ.get("RANK", "0") == "0", 0
    try:
        console = Console(file=cast(IO[str], LossyOutput()), quiet=not first)
        if options.saver == "hf":
            (from_megatron if options.loader == "megatron" else to_hf)(options, console)
        else:
            (to_core if options.saver == "core" else to_megatron)(options, console)
    except UserError as error:
        if first or not error.agreed:
            print_error(f"convert: {error}")
        status = 2
    stop_processes()
    settle()
    return status


if __name__ == "__main__":
    sys.exit(main())
