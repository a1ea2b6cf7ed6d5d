"""What a run file may say: ten sections and phases, each a dataclass; facts only, no behaviour.

megatron-core's own dataclasses are the schema of their own fields. A section that takes some of them has a `dict` field
whose metadata names the dataclass (`megatron`); with `inline` the fields stand directly in the section, else under the
field's name. The section `method` takes a section of its own per method, whose dataclass the method brings along
(`variants`). TransformerConfig's fields are divided: those of its base ModelParallelConfig belong to `parallel`, the
FP8 ones to `precision`, the rest to `model`. Fields that another key or the checkpoint decides are in `OWNED_*` with
the place that decides them.
"""
# ruff: noqa: SIM905, RUF009 - names read better as one line of words; _megatron returns a dataclass field

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ssu.config.megatron_fields import DDP, MODEL_PARALLEL, OPTIMIZER, TRANSFORMER, MegatronClass

_CHECKPOINT = "config.json of model.path decides it"
_PRECISION = "precision.dtype decides it"
_LOOP = "the training loop sets it"

OWNED_TRANSFORMER: dict[str, str] = {
    **dict.fromkeys(
        (
            "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels normalization "
            "layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias gated_linear_unit "
            "activation_func qk_layernorm init_method_std init_method output_layer_init_method rotary_interleaved"
        ).split(),
        _CHECKPOINT,
    ),
    **dict.fromkeys("bf16 fp16 params_dtype pipeline_dtype autocast_dtype enable_autocast".split(), _PRECISION),
    **dict.fromkeys(
        (
            "timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func "
            "_cpu_offloading_context perform_initialization use_cpu_initialization transformer_impl"
        ).split(),
        _LOOP,
    ),
}
OWNED_OPTIMIZER: dict[str, str] = {
    **dict.fromkeys("bf16 fp16 params_dtype".split(), _PRECISION),
    **dict.fromkeys("timers use_distributed_optimizer barrier_with_L1_time".split(), _LOOP),
    "fp8_recipe": "precision.fp8_recipe decides it",
    "overlap_param_gather": "parallel.ddp.overlap_param_gather decides it",
}
OWNED_DDP: dict[str, str] = {"use_distributed_optimizer": _LOOP}

OPTIMIZER_DEFAULTS: dict[str, Any] = {
    "lr": 5e-5,
    "min_lr": 0.0,
    "weight_decay": 0.01,
    "clip_grad": 1.0,
}

_PARALLEL = set(MODEL_PARALLEL.names)
_PRECISION_FIELDS = {name for name in TRANSFORMER.names if name.startswith(("fp8", "fp4"))} | {
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "tp_only_amax_red",
}
_ALL = set(TRANSFORMER.names)


def _megatron(
    cls: MegatronClass, names: set[str], owned: dict[str, str], *, inline: bool, defaults: dict[str, Any] | None = None
) -> Any:
    """A dict field that holds values for `names` of megatron's dataclass `cls`; `defaults` are ours, not megatron's."""
    metadata = {"megatron": cls, "names": frozenset(names - set(owned)), "owned": owned, "inline": inline}
    return field(default_factory=lambda: dict(defaults or {}), metadata=metadata)


@dataclass
class ModelSection:
    """The source model. Further keys: TransformerConfig's fields (recompute_granularity, attention_backend, ...)."""

    path: str  # Hugging Face directory (config.json, tokenizer, *.safetensors), or a hub id: ORG/NAME or ORG/NAME@REVISION
    # Where path is a Megatron checkpoint (torch_dist): the Hugging Face directory of its config.json and tokenizer.
    hf_path: str | None = None
    trust_remote_code: bool = False  # let the tokenizer run code out of model.path
    make_vocab_size_divisible_by: int = 128  # the padded vocabulary; the same on every mesh
    transformer: dict = _megatron(TRANSFORMER, _ALL - _PARALLEL - _PRECISION_FIELDS, OWNED_TRANSFORMER, inline=True)


@dataclass
class ParallelSection:
    """The mesh. Keys: ModelParallelConfig's fields (tensor_model_parallel_size, sequence_parallel, ...)."""

    timeout_minutes: float = 30.0  # a collective that waits longer ends the job
    transformer: dict = _megatron(TRANSFORMER, _PARALLEL, OWNED_TRANSFORMER, inline=True)
    ddp: dict = _megatron(DDP, set(DDP.names), OWNED_DDP, inline=False)

    @property
    def tensor(self) -> int:
        return self.transformer.get("tensor_model_parallel_size", 1)

    @property
    def pipeline(self) -> int:
        return self.transformer.get("pipeline_model_parallel_size", 1)

    @property
    def virtual_pipeline(self) -> int | None:
        return self.transformer.get("virtual_pipeline_model_parallel_size")

    @property
    def context(self) -> int:
        return self.transformer.get("context_parallel_size", 1)

    @property
    def expert(self) -> int:
        return self.transformer.get("expert_model_parallel_size", 1)

    @property
    def sequence_parallel(self) -> bool:
        return self.transformer.get("sequence_parallel", False)


@dataclass
class PrecisionSection:
    """Number formats. Further keys: TransformerConfig's fp8 fields."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    transformer: dict = _megatron(TRANSFORMER, _PRECISION_FIELDS, OWNED_TRANSFORMER, inline=True)


@dataclass
class CalibrationSection:
    """Samples that the model is scored on; `text` lines are taken as they stand, chats are rendered."""

    path: str | list[str] | None = None  # JSONL of chats or text (.gz, .zst); needed by data-driven scores
    samples: int = 500
    sequence_length: int = 2048  # packed length in tokens, cut to the model's own limit
    micro_batch_size: int = 1
    seed: int = 1234


@dataclass
class ProtectSection:
    """Weights that are frozen, or trainable, whatever their scores."""

    pattern: str  # embeddings, head, norms, attention, mlp, layers:0-3, or a pattern such as *.o_proj.weight
    action: Literal["frozen", "trainable"]


@dataclass
class MethodSection:
    """What trains. Further keys: a section per method, with its own options (method.hft.ratio, ...)."""

    name: str = "ssu"  # a method of methods/registry.py
    options: dict = field(default_factory=dict, metadata={"inline": True, "variants": True})  # name -> its dataclass


@dataclass
class ShieldSection:
    """Which weights stay as they are, for methods that plan a shield from scores."""

    file: str | None = None  # a shield made before; null: <checkpoint.directory>/shield.safetensors, planned if missing
    scores: str | None = None  # scores made before; null: <checkpoint.directory>/scores.safetensors, made if missing
    score: str = "wanda"  # see scoring/registry.py
    granularity: str = "column"  # column, row, element, matrix, layer
    also_score: list[str] = field(default_factory=list)  # further scores that one `score` run writes beside
    budget: str = "uniform"  # uniform, layerwise, per-kind
    ratio: float = 0.5  # frozen fraction
    freeze: Literal["highest", "lowest"] = "highest"  # which end of the ranking is frozen
    kinds: dict[str, float] = field(default_factory=dict)  # budget per-kind: attention, mlp or a kind -> ratio
    floor: float = 0.0  # budget layerwise: least and greatest frozen fraction of a matrix
    ceiling: float = 1.0
    seed: int = 1234  # of the score random
    protect: list[ProtectSection] = field(default_factory=list)  # always frozen, always trainable; the last that fits
    norms: Literal["trainable", "frozen", "half", "half-released"] = (
        "trainable"  # norm weights; half: by |w| and inputs
    )
    biases: Literal["trainable", "frozen", "half"] = "trainable"  # biases of linear layers; half: by |b|
    special_tokens: bool = True  # freeze the chat template's special-token rows of embedding and head
    calibration: CalibrationSection = field(default_factory=CalibrationSection)  # source samples
    target_calibration: CalibrationSection = field(
        default_factory=CalibrationSection
    )  # target text: score target-contrast
    change_from: str | None = None  # score change: the Hugging Face directory to compare model.path with
    reserve: list[str] = field(
        default_factory=list
    )  # shields and packs; what they train is frozen, and counts in ratio

    @property
    def measures_norms(self) -> bool:
        """Whether the norms' inputs are measured when scoring."""
        return self.norms in ("half", "half-released")


@dataclass
class Ramp:
    """A weight that changes linearly over the run, by its samples."""

    start: float
    end: float


Packing = Literal["stream", "documents", "none"]
TooLong = Literal["truncate", "drop", "refuse"]


@dataclass
class DataSource:
    """One part of a blend; what is null is as in the section `data`."""

    # JSONL (.gz, .zst), Parquet, Arrow, a directory of datasets' save_to_disk, the id of a Hugging Face dataset, or the
    # prefix of an indexed dataset (PREFIX.bin, PREFIX.idx)
    path: str
    weight: float | Ramp = 1.0  # in data.weights_in
    columns: dict[str, str] = field(
        default_factory=dict
    )  # what is read (messages, text, instruction, ...) -> its column
    split: str = "train"  # of a Hugging Face dataset
    subset: str | None = None  # of a Hugging Face dataset: the name of its configuration
    loss_on: Literal["all", "answers"] | None = None
    packing: Packing | None = None
    too_long: TooLong | None = None
    wrap: Literal["none", "answer"] | None = None


@dataclass
class FilterSection:
    """Which generated answers are kept."""

    min_tokens: int = 1
    max_tokens: int | None = None
    ends: bool = True  # the model ended its turn within max_new_tokens
    max_repetition: float = 0.5  # greatest fraction of an answer's 4-grams of tokens that repeat an earlier one
    language: str | None = (
        None  # of `identifier`: a script of Unicode (latin, ethiopic, ...) or a language code (en, am, ...)
    )
    identifier: Literal["script", "langid"] = "script"


@dataclass
class GenerateSection:
    """Answers of a model to prompts."""

    prompts: str  # JSONL or a table: chats, of which a last answer is left out, instructions, prompts or text
    samples: int | None = None  # prompts drawn by `seed`; null: all
    seed: int = 1234
    temperature: float = 0.0  # 0: the likeliest token each time
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    max_new_tokens: int = 512
    batch_size: int = 8  # prompts that are answered together
    backend: Literal["auto", "transformers", "vllm"] = "auto"  # auto: vLLM where it is installed
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: that of the model's files
    too_long: Literal["refuse", "drop"] = "refuse"  # prompts that with max_new_tokens exceed the model's positions
    filter: FilterSection = field(default_factory=FilterSection)


@dataclass
class ReplaySection:
    """Earlier ability that is repeated beside what data.train names."""

    fraction: float | Ramp = 0.0  # of all that is trained on, in data.weights_in (of tokens, where that is epochs)
    path: str | list[str | DataSource] | None = None  # real data, as in data.train
    generate: GenerateSection | None = None  # or answers of the model that the run, or phase, starts from


@dataclass
class DataSection:
    """What is trained on and what is watched."""

    train: str | list[str | DataSource] = field(default_factory=list)
    source_valid: str | dict[str, str] | None = None  # watched for forgetting; or several, name: path
    target_valid: str | dict[str, str] | None = None  # null: the valid part of `split`
    split: str | None = None  # train,valid,test fractions of the train documents; null: see `used_split`
    weights_in: Literal["samples", "tokens", "epochs"] = "samples"  # what the weights of `train` count
    sequence_length: int = 512
    loss_on: Literal["all", "answers"] = (
        "all"  # of chats: all tokens, or what the assistant says and the end of its turn
    )
    # stream: documents joined and cut every sequence_length tokens; documents: whole ones placed in rows; none: one per row
    packing: Packing = "stream"
    too_long: TooLong = "truncate"  # documents that are longer than a row, where packing is not stream
    # Whether tokens attend to other documents in their row; false: position ids restart too. null: where all is a stream
    cross_document_attention: bool | None = None
    wrap: Literal["none", "answer"] = "none"  # answer: plain text becomes the assistant's answer in the chat template
    wrap_prompt: str = ""  # what the user says before it
    text_key: str = "text"
    document_end: str | None = None  # the token that ends a plain document; null: the tokenizer's end-of-text token
    directory: str | None = None  # where tokenized text is kept; null: data in checkpoint.directory
    seed: int = 1234
    workers: int = 2  # tokenizer processes of `prepare`
    loader_workers: int = (
        2  # data loader processes per rank; divided over its virtual stages, at least one each; 0: none
    )

    @property
    def used_split(self) -> str:
        """`split`; left out, all documents train where there is a target_valid, else 1 % of them validate."""
        if self.split is not None:
            return self.split
        return "100,0,0" if self.target_valid else "99,1,0"


@dataclass
class ScheduleSection:
    """Learning rate over the run; the peak is train.optimizer.lr, the end train.optimizer.min_lr."""

    decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    warmup_fraction: float = 0.05
    wsd_decay_fraction: float = 0.1  # WSD: fraction of the run in which the rate decays
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "linear"


@dataclass
class RegularizeSection:
    """Pulls towards the source model, whatever the method; 0: none. See docs/regularize.md."""

    l2: float = 0.0  # loss + l2 / 2 ||W - W_source||^2 over what trains
    kl: float = 0.0  # loss + kl * KL(p_source || p_model), mean over tokens; takes a second copy of the model
    kl_temperature: float = 1.0  # both distributions are softened by it; the gradient keeps its scale


@dataclass
class TrainSection:
    """The loop."""

    iterations: int = -1  # steps; -1: as tokens or epochs say, else 1000
    tokens: str | int | None = None  # instead: tokens to train on, such as 200M, padding included
    epochs: float | None = None  # instead: as many samples as all sources together hold, so many times
    micro_batch_size: int = 1
    global_batch_size: int = 32
    seed: int = 1234
    eval_interval: int = 100  # iterations between evaluations; 0: at start and end only
    eval_batches: int = 8  # global batches an evaluation reads at most
    exit_after: str | float | None = None  # wall-clock budget, minutes or HH:MM:SS: then save and exit with status 75
    max_skipped: int = 10  # stop after this many skipped steps in a row (loss or gradient not finite)
    fused_adam: bool = (
        True  # torch's fused AdamW where neither Transformer Engine's nor Apex's is there; false: its default
    )
    spike_sigma: float = 6.0  # warn when the loss is this many std above the mean of the last 128; 0: never
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    regularize: RegularizeSection = field(default_factory=RegularizeSection)
    optimizer: dict = _megatron(
        OPTIMIZER,
        set(OPTIMIZER.names),
        OWNED_OPTIMIZER,
        inline=False,
        defaults=OPTIMIZER_DEFAULTS,
    )


@dataclass
class CheckpointSection:
    """Where everything of a run goes."""

    directory: str  # scores, shield, checkpoints, logs, the resolved run file
    interval: int = 500  # iterations between checkpoints; 0: at the end only
    keep: int | None = None  # newest checkpoints kept, of each phase; null: all
    async_save: bool = False  # write in the background while training continues; takes memory for a copy of the state
    resume: bool = True  # from the newest checkpoint in `directory`; false: refuse a directory that has one
    export: str | None = None  # write a Hugging Face directory here when the run ends
    max_shard_size: str | int = "5GB"  # of an exported safetensors file; KB, MB, GB, KiB, MiB, GiB or bytes


@dataclass
class RuleSection:
    """A figure that has become worse than before the first step."""

    figure: str  # source_valid_loss, target_valid_loss/NAME, or evaluate/DATA/METRIC
    worse_by: float  # per cent


@dataclass
class BestSection:
    """Which checkpoint is the best."""

    figure: str  # as in a rule; that with the best value
    unless: RuleSection | None = None  # not where this is so


@dataclass
class EvaluateSection:
    """What the model is asked while it trains; see docs/evaluate.md."""

    interval: int = 0  # steps between these evaluations; 0: at start and end only
    texts: dict[str, str] = field(default_factory=dict)  # name -> JSONL or a table: loss per byte and per token
    chats: dict[str, str] = field(
        default_factory=dict
    )  # name -> JSONL or a table: greedy answers, compared and looked at
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness, or task files (.yaml)
    task_path: str | None = None  # a folder of further task files
    fewshot: int | None = None  # examples before each question; null: as each task says
    chat_template: bool = False  # ask the tasks' questions as chats
    limit: int | None = None  # the first so many documents, chats, and questions per task
    sequence_length: int | None = None  # of texts; null: the model's positions
    max_new_tokens: int = 128  # longest answer to a chat
    batch_size: int = 8  # rows at a time
    identifier: str = "auto"  # of languages: script, langid (auto: where it is installed), MODULE:FUNCTION
    stop_when: RuleSection | None = None  # end the run, with a checkpoint, at the first evaluation that finds it so
    best: BestSection | None = None  # save, and keep, the best checkpoint; `checkpoints/best` names it

    @property
    def asks(self) -> bool:
        """Whether anything is asked but the validation losses."""
        return bool(self.texts or self.chats or self.tasks)


@dataclass
class LogSection:
    """What is logged while it runs."""

    interval: int = 10  # iterations between console lines
    tensorboard: bool = True  # event files, where tensorboard is installed; else one warning
    wandb_project: str | None = None  # Weights & Biases project, where wandb is installed
    peak_tflops: float | None = None  # of one GPU, for MFU; null: known GPUs' dense peak


@dataclass
class PhaseSection:
    """One phase of a run. Further keys: the sections `PHASE_SECTIONS`, of which what is left out is as above the phases."""

    name: str  # letters, digits and . _ -
    optimizer: Literal["fresh", "kept"] = "fresh"  # kept: Adam's moments of the phase before, under the same shield
    export: str | None = (
        None  # the Hugging Face directory that the phase ends with; null: `model` in the phase's directory
    )


@dataclass
class Phase:
    """A phase, with the run file that it comes to: that of the whole run with the phase's sections merged over it."""

    section: PhaseSection
    run: RunConfig


@dataclass
class RunConfig:
    """A whole run file."""

    model: ModelSection
    checkpoint: CheckpointSection
    parallel: ParallelSection = field(default_factory=ParallelSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    method: MethodSection = field(default_factory=MethodSection)
    shield: ShieldSection = field(default_factory=ShieldSection)
    data: DataSection = field(default_factory=DataSection)
    replay: ReplaySection = field(default_factory=ReplaySection)
    train: TrainSection = field(default_factory=TrainSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    log: LogSection = field(default_factory=LogSection)
    phases: list[Phase] = field(
        default_factory=list, metadata={"phases": True}
    )  # one after the other; see config/phases.py
