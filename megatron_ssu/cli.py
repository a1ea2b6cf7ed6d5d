"""The command line: parse, call, turn user errors into one line and exit status 2."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, NoReturn, cast

from rich.console import Console

from megatron_ssu import __version__
from megatron_ssu.errors import STATUS_RANK_LOST, TrainingStopped, UserError
from megatron_ssu.io.output import LossyOutput, open_closed_streams, print_error, settle

EPILOG = """\
a run, from a Hugging Face model to an adapted one:
  megatron-ssu train run.yaml                        scores, plans and trains; makes what is missing
  megatron-ssu export run.yaml --output adapted/     newest checkpoint -> Hugging Face directory
  megatron-ssu verify --source model/ --adapted adapted/ --shield runs/x/shield.safetensors

score, train and export run alone, or on every rank of
  torchrun --nproc-per-node 8 -m megatron_ssu train run.yaml parallel.tensor_model_parallel_size=2

exit status: 0 done; 1 verify found a frozen weight that moved or another model definition, or a bug; 2 bad input, a run that
  another job holds, a checkpoint that could not be written, reported in one line, or nothing frozen that verify could check;
  3 too many steps skipped; 4 a rank was lost or hangs; 5 evaluate.stop_when was met; 75, 130, 143 training was stopped, with a
  checkpoint, by SIGUSR1 or train.exit_after, SIGINT, SIGTERM: start again
"""
OVERRIDES = "section.key=value: overrides the run file, such as shield.ratio=0.25"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `megatron-ssu` and `python -m megatron_ssu`; ends the process with the exit status."""
    open_closed_streams()
    options = _parse(arguments)
    # torch reads it once: huge pages for large tensors on the CPU, which are otherwise mapped anew page by page.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    first = int(os.environ.get("RANK", "0")) == 0
    for kind in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind)  # those of libraries; ours are logged
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    width = None if sys.stdout.isatty() else 160
    output = LossyOutput()
    console = Console(file=cast(IO[str], output), quiet=not first, soft_wrap=True, width=width)
    status = 0
    try:
        status = _call(options, console)
    except UserError as error:
        if first or (not error.agreed and _joined()):
            rank = "" if first else f" (rank {os.environ['RANK']})"
            print_error(f"megatron-ssu{rank}: {error}")
        status = 2
    except TrainingStopped as stop:
        if first or stop.status == STATUS_RANK_LOST:
            print_error(f"megatron-ssu: {stop}")
        status = stop.status
        if status == STATUS_RANK_LOST:  # the process groups cannot be taken down without the lost rank
            os._exit(status)
    except KeyboardInterrupt:
        status = 130
    if "megatron_ssu.engine.mesh" in sys.modules:  # else no process group was started
        sys.modules["megatron_ssu.engine.mesh"].stop_processes()
    settle()
    if (
        output.lost and status == 0 and options.command in ("estimate", "inspect", "compare", "similarity")
    ):  # called for what they print
        print_error(f"megatron-ssu: standard output cannot be written: {output.lost}; write it elsewhere")
        status = 2
    sys.exit(status)


def _call(options: argparse.Namespace, console: Console) -> int:
    """Run the command; its run file is refused before anything slow is imported."""
    file, overrides = getattr(options, "run", None), getattr(options, "overrides", [])
    if options.command == "prepare":
        if (options.model is None) != (options.output is None):
            raise UserError("prepare: --model and --output go together; or give a run file")
        if options.output is None:
            file, overrides = options.inputs[0], options.inputs[1:] + overrides
    from megatron_ssu.commands.pinned import pin_options, pin_run

    run_file, weights = None, options.command not in ("prepare", "estimate")
    if file is None:
        pin_options(options, weights=weights)
    else:
        from megatron_ssu.methods.registry import read_run

        run_file = read_run(file, overrides, partial(pin_run, weights=weights))
        if hasattr(options, "phase"):
            from megatron_ssu.config.phases import phase_named

            run_file = phase_named(run_file, options.phase)
    return importlib.import_module(f"megatron_ssu.commands.{options.command}").run(run_file, options, console)


def _joined() -> bool:
    """Whether this rank is in the job's process group. Before, all ranks read the same arguments and meet the same errors."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options; argparse takes those before only."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    wrong = [r for r in rest if r.startswith("-") or "=" not in r or not hasattr(options, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides += rest
    return options


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megatron-ssu",
        description="Teach an instruct model a new language and keep what it could do: Source-Shielded Updates.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=f"{text}. {more}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(command=name)
        return command

    def add_run(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        command = add(name, text, more)
        command.add_argument("run", metavar="RUN.yaml", help="the run file")
        command.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=OVERRIDES)
        return command

    _add_prepare(add)
    _add_phase(add_run("score", "Score a model's weights on source samples", "Writes scores.safetensors."))
    _add_phase(add_run("plan", "Choose from scores what to freeze", "Writes shield.safetensors."))
    add_run("train", "Adapt the model", "Makes datasets, scores and shield where they are missing.")
    command = add_run("export", "Write a checkpoint as a Hugging Face directory")
    _add_phase(command)
    command.add_argument("--output", required=True, metavar="DIR", help="the directory to make")
    command.add_argument("--iteration", type=int, metavar="N", help="checkpoint to export (default: the newest)")
    command = add("verify", "Check bit by bit that what was frozen did not move")
    command.add_argument("--source", required=True, metavar="DIR", help="the model before: a directory or hub id")
    command.add_argument("--adapted", required=True, metavar="DIR", help="the model after")
    under = command.add_mutually_exclusive_group(required=True)
    under.add_argument("--shield", metavar="FILE", help="the shield that it was trained under")
    under.add_argument("--packs", nargs="+", metavar="PACK", help="or the packs that are in it, and nothing else")
    command.add_argument("--json", metavar="FILE", help="write the report there as well")
    command = add_run(
        "estimate",
        "Estimate memory, compute and time of a run",
        "Reads config.json, no weights; the shield file where it is there, else shield.ratio.",
    )
    _add_phase(command)
    command.add_argument("--world-size", type=int, metavar="N", help="ranks (default: one replica's)")
    command.add_argument("--gpu", metavar="NAME", help="a100, h100, h200, b200: does it fit, and how long is a step")
    command.add_argument("--efficiency", type=float, default=0.6, help="fraction of the peak that GEMMs reach (0.6)")
    command.add_argument(
        "--local-layers", action="store_true", help="count megatron-core's own layers, not Transformer Engine's"
    )
    command.add_argument("--json", metavar="FILE", help="write the figures there as well")
    _add_shield_tools(add)
    _add_pack(add)
    _add_generate(add)
    _add_evaluate(add)
    _add_dial(add)
    _add_report(add)
    _add_measures(add)
    return parser


def _add_phase(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--phase", metavar="NAME", help="the phase of a run with phases (default: the newest that began)"
    )


def _add_shield_tools(add: Callable) -> None:
    command = add(
        "inspect",
        "Look at a shield: a table, and pictures",
        "With --scores also score ranges and how clear the cut is, with --compare the overlap with another shield.",
    )
    command.add_argument("shield", metavar="SHIELD", help="the shield file")
    command.add_argument("--scores", metavar="FILE", help="the scores file that it was planned from")
    command.add_argument("--score", metavar="NAME", help="the score to show (default: the shield's own)")
    command.add_argument("--compare", metavar="SHIELD", help="another shield of the same model")
    command.add_argument("--output", metavar="DIR", help="draw PNG files there")
    command.add_argument("--json", metavar="FILE", help="write the table there as well")
    command = add(
        "compose",
        "Combine shields of one model",
        "union: frozen in any; intersection: frozen in all; difference: frozen in the first, in none of the others.",
    )
    command.add_argument("operation", choices=("union", "intersection", "difference"))
    command.add_argument("shields", nargs="+", metavar="SHIELD", help="two shield files or more")
    command.add_argument("--output", required=True, metavar="FILE", help="the shield file to make")


def _add_pack(add: Callable) -> None:
    command = add(
        "pack",
        "Carry an adaptation as a file: make it, put it on, take it off, stack several",
        "A pack holds what moved, and goes both ways bit for bit.",
    )
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=f"{text}.")

    made = action("create", "Make a pack of what an adaptation moved")
    made.add_argument("--source", required=True, metavar="DIR", help="the model before: a directory or hub id")
    made.add_argument("--adapted", required=True, metavar="DIR", help="the model after")
    made.add_argument("--shield", required=True, metavar="FILE", help="the shield that it was trained under")
    made.add_argument("--output", required=True, metavar="PACK", help="the safetensors file to make")
    for name, text, model in (
        ("apply", "Put a pack on its source: the adapted directory, bit for bit", "the source"),
        (
            "remove",
            "Take a pack off: the source directory, bit for bit, or a stack without it",
            "a model that it is in",
        ),
    ):
        other = action(name, text)
        other.add_argument("model", metavar="DIR", help=f"{model}: a directory or hub id")
        other.add_argument("pack", metavar="PACK", help="the pack")
        other.add_argument("--output", required=True, metavar="DIR", help="the directory to make")
    several = action("stack", "Put packs of one source on it that move none of each other's weights")
    several.add_argument("packs", nargs="+", metavar="PACK", help="two packs or more")
    several.add_argument("--source", required=True, metavar="DIR", help="their source: a directory or hub id")
    several.add_argument("--output", required=True, metavar="DIR", help="the directory to make")


def _add_evaluate(add: Callable) -> None:
    command = add(
        "evaluate",
        "Evaluate models side by side: losses, answers, tasks of lm-evaluation-harness; forgetting against the first",
        "A MODEL is a Hugging Face directory or hub id, or a run's directory (its checkpoint; @N: of iteration N).\n"
        "  megatron-ssu evaluate source=models/base SSU=models/adapted --texts en.jsonl am.jsonl --chats chats.jsonl\n"
        "Runs alone, in transformers, or on every rank of torchrun, on the mesh of --run-file.",
    )
    command.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="the first is the source, with which the others are compared"
    )
    _add_questions(command)
    command.add_argument("--output", metavar="FILE", help="write the results there as JSON lines")
    command.add_argument("--answers", metavar="DIR", help="write the models' answers there")


def _add_dial(add: Callable) -> None:
    command = add(
        "dial",
        "Dial an adaptation back: evaluate models between source and adapted one, and export the best",
        "Frozen weights stay at every point; 0 is the source, 1 the adapted model.\n"
        "  megatron-ssu dial --source models/base --adapted models/adapted --texts source=en.jsonl target=am.jsonl \\\n"
        "      --output dialled/ --export models/dialled",
    )
    command.add_argument("--source", required=True, metavar="DIR", help="the model before: a directory or hub id")
    command.add_argument("--adapted", required=True, metavar="DIR", help="the model after")
    command.add_argument("--steps", type=int, default=5, metavar="N", help="points, both ends among them (5)")
    command.add_argument(
        "--per-kind", action="store_true", help="dial attention, MLP, embeddings and norms alone, one by one"
    )
    command.add_argument(
        "--source-figure", default="source:loss_per_byte", metavar="DATA:METRIC", help="what is to be kept"
    )
    command.add_argument(
        "--target-figure", default="target:loss_per_byte", metavar="DATA:METRIC", help="what is to be learnt"
    )
    command.add_argument(
        "--keep",
        type=float,
        default=3.0,
        metavar="PERCENT",
        help="choose the best target among points that forget no more (3)",
    )
    command.add_argument("--choose", metavar="POINT", help="or choose this one, such as 0.5")
    _add_questions(command)
    command.add_argument("--output", required=True, metavar="DIR", help="write picture, points and results there")
    command.add_argument("--export", metavar="DIR", help="write the chosen model there")


def _add_report(add: Callable) -> None:
    command = add(
        "report", "Write one page about runs: what was trained, curves, evaluation, costs, how to do it again"
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs (checkpoint.directory)")
    command.add_argument("--output", required=True, metavar="FILE.html", help="the page, which needs nothing else")
    command.add_argument("--results", nargs="+", metavar="FILE", help="what `evaluate --output` wrote")
    command.add_argument("--verify", action="store_true", help="verify the runs' exports, and say what came out")


def _add_questions(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--texts", nargs="+", metavar="[NAME=]FILE", help="JSONL of texts: loss per byte and per token"
    )
    command.add_argument(
        "--chats", nargs="+", metavar="[NAME=]FILE", help="JSONL of chats: answers are compared and looked at"
    )
    command.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, or task files (.yaml)"
    )
    command.add_argument("--task-path", metavar="DIR", help="a folder of further task files")
    command.add_argument("--fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    command.add_argument("--chat-template", action="store_true", help="ask the tasks' questions as chats")
    command.add_argument("--limit", type=int, metavar="N", help="the first N documents, chats, and questions per task")
    command.add_argument("--sequence-length", type=int, metavar="N", help="of texts (default: the model's positions)")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer to a chat (128)")
    command.add_argument(
        "--identifier",
        default="auto",
        metavar="NAME",
        help="of languages: script, langid, MODULE:FUNCTION (langid if there)",
    )
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (8)")
    command.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: that of the files; fp32 on a CPU"
    )
    command.add_argument(
        "--run-file", metavar="RUN.yaml", help="evaluate on the mesh, and in the precision, of this run file"
    )


def _add_measures(add: Callable) -> None:
    command = add(
        "compare",
        "Compare models with a base: how far weights and hidden states drifted",
        "With --text also hidden states and predictions, alone or on the mesh of --run-file under torchrun.",
    )
    command.add_argument(
        "models", nargs="+", metavar="DIR", help="Hugging Face directories or hub ids; the first is the base"
    )
    command.add_argument("--text", metavar="FILE", help="JSONL of chats or text that the models read")
    command.add_argument("--samples", type=int, default=64, metavar="N", help="of the text, drawn by seed (64)")
    command.add_argument("--sequence-length", type=int, default=512, metavar="N", help="tokens per row (512)")
    command.add_argument("--seed", type=int, default=1234, metavar="N", help="of the draw (1234)")
    command.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="rows at a time (1)")
    command.add_argument("--run-file", metavar="RUN.yaml", help="mesh and precision are as in this run file")
    command.add_argument("--output", metavar="DIR", help="draw PNG files there")
    command.add_argument("--json", metavar="FILE", help="write the figures there as well")
    command = add("similarity", "Compare sets of instructions by their mean embeddings (DES)")
    command.add_argument("data", nargs="+", metavar="DATA", help="JSONL, Parquet or Arrow: chats, instructions or text")
    command.add_argument("--encoder", metavar="DIR", help="a sentence-transformers directory, such as LaBSE's")
    command.add_argument("--model", metavar="DIR", help="or a language model, whose hidden states are averaged")
    command.add_argument("--layer", type=int, default=-1, metavar="N", help="of the language model (-1: the last)")
    command.add_argument("--samples", type=int, default=1000, metavar="N", help="instructions of each set (1000)")
    command.add_argument("--seed", type=int, default=1234, metavar="N", help="of the draw (1234)")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="instructions at a time (16)")
    command.add_argument("--json", metavar="FILE", help="write the figures there as well")


def _add_generate(add: Callable) -> None:
    command = add(
        "generate",
        "Let a model answer prompts",
        "Writes chats that can be trained on. Stopped at any time, the same command goes on; options as in replay.generate.\n"
        "  megatron-ssu generate MODEL PROMPTS.jsonl --output ANSWERS.jsonl\n"
        "Runs alone, in --processes, or on every rank of torchrun.",
    )
    command.add_argument("model", metavar="MODEL", help="Hugging Face directory or hub id of an instruct model")
    command.add_argument(
        "prompts", metavar="PROMPTS", help="JSONL, Parquet or Arrow: chats, instructions, prompts or text"
    )
    command.add_argument(
        "--output", required=True, metavar="FILE", help="JSONL file to make; FILE.json says what it is made of"
    )
    command.add_argument("--samples", type=int, metavar="N", help="prompts drawn by the seed (default: all)")
    command.add_argument("--seed", type=int, metavar="N", help="of the draw and of sampling (default 1234)")
    command.add_argument("--temperature", type=float, metavar="T", help="0, the default: the likeliest token each time")
    command.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this mass")
    command.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default 512)")
    command.add_argument("--batch-size", type=int, metavar="N", help="prompts that are answered together (default 8)")
    command.add_argument("--backend", choices=("auto", "transformers", "vllm"), help="auto: vLLM where it is installed")
    command.add_argument("--dtype", choices=("auto", "bf16", "fp32"), help="auto: that of the model's files")
    command.add_argument("--too-long", choices=("refuse", "drop"), help="prompts that are too long (default: refuse)")
    command.add_argument("--processes", type=int, default=1, metavar="N", help="share the work (default 1)")
    command.add_argument("--trust-remote-code", action="store_true", help="run the model's own code, if it has any")
    kept = command.add_argument_group("answers that are kept")
    kept.add_argument("--min-tokens", type=int, metavar="N", help="shortest (default 1)")
    kept.add_argument("--max-tokens", type=int, metavar="N", help="longest")
    kept.add_argument("--unended", dest="ends", action="store_const", const=False, help="also those cut at the limit")
    kept.add_argument(
        "--max-repetition", type=float, metavar="F", help="greatest fraction of repeated 4-grams (default 0.5)"
    )
    kept.add_argument("--language", metavar="NAME", help="latin, ethiopic, ... or, by langid, en, am, ...")
    kept.add_argument("--identifier", choices=("script", "langid"), help="what tells languages apart (default: script)")


def _add_prepare(add: Callable) -> None:
    command = add(
        "prepare",
        "Tokenize JSONL files and tables",
        "Either for a run file:\n  megatron-ssu prepare RUN.yaml [KEY=VALUE ...]\n"
        "or any files into one indexed dataset:\n"
        "  megatron-ssu prepare --model DIR --output PREFIX FILE.jsonl[.gz|.zst]|FILE.parquet|FILE.arrow ...",
    )
    command.add_argument("inputs", nargs="+", metavar="RUN.yaml|FILE", help="the run file, or JSONL files")
    command.add_argument("--model", metavar="DIR", help="directory with the tokenizer")
    command.add_argument("--output", metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx")
    command.add_argument("--workers", type=int, metavar="N", help="tokenizer processes (default 2)")
    command.add_argument("--text-key", metavar="KEY", help="key of the text (default text)")
    command.add_argument("--loss-on", choices=("all", "answers"), help="chats: where there is loss (default all)")
    command.add_argument("--document-end", metavar="TOKEN", help="ends a document (default: the end-of-text token)")
    command.add_argument("--skip-bad-lines", action="store_true", help="skip and count bad lines instead of stopping")
    command.add_argument("--overwrite", action="store_true", help="replace PREFIX.bin and PREFIX.idx")
    command.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's own code, if it has any")
    command.set_defaults(overrides=[])
