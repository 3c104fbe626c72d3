"""The settings of a sweep, typed.

In: plain values read from YAML and the command line. Out: a frozen `Sweep`, or a pydantic error that names the key.
The defaults here are the tool's defaults; the presets in this folder list only what differs.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from evaluators.conditions import CONDITIONS, CONTROLS
from search_spaces.dimensions import Choice, Dimension, Finite, Range, real, text, whole
from search_spaces.sections import (
    Behaviours,
    Distinct,
    Expected,
    Layers,
    LayerSet,
    Name,
    Sampler,
    Section,
    Sets,
)
from trainers.settings import BaseTraining, Count, DeltaTraining, Fraction, LoraTraining, Positive


class Model(Section):
    source: Name = "smollm2-135m"
    """`smollm2-135m` (embedded), `gemma3-270m` (after `make gemma`), `tiny-gemma2` (random, for tests), a local folder,
    a GGUF file, or a hub repository."""
    revision: Name | None = None
    finetuned: Name | None = None
    """Your own finetuned model, instead of a LoRA trained here: a folder or hub repository with a full model of the
    same architecture and shape, or a PEFT adapter."""
    finetuned_revision: Name | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the evaluation. `bf16` is for models that do not fit otherwise: it moves many figures by more than a
    tenth of their interval, and the exactness checks then tolerate its rounding."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _of_older_sweeps(cls, given: object) -> object:
        """`auto` is in the settings that older sweeps saved; on a CPU it was fp32."""
        return "fp32" if given == "auto" else given


class Data(Section):
    train_rows: Count = 10000
    """Total over all labels, which get equal shares."""
    validation_rows: Count = 200
    eval_rows: Count = 100
    """Rows per label, that is, per evaluation subset."""
    text_train_lines: Count = 16200
    text_validation_lines: Count = 1800
    rows_file: Name | None = None
    """Your own rows instead of the generated ones: JSON, CSV, Parquet, or a hub dataset OWNER/NAME[:SPLIT]. Each label
    is a subset, at most 12. A row without a target gets the finetuned model's own answer (`model.finetuned`)."""
    evaluation_file: Name | None = None
    """Rows for evaluation only; null takes them from `rows_file`."""
    columns: dict[Literal["input", "target", "label", "messages"], Name] = {}
    """Your files' names for these columns, where they differ."""
    format: Literal["plain", "chat"] = "plain"
    """`chat` renders input or messages with the tokenizer's chat template; in `plain`, `separator` ends the input."""
    separator: str = "\n"
    """In the plain format, the text between input and target; may be empty."""
    rendering: Literal["conversation", "generation"] = "conversation"
    """For chats. `conversation` splits the whole conversation, as training reads it, into prompt and target; with
    `generation`, the prompt is the template's generation prompt and the target is the answer's text alone."""
    special_tokens: Literal["refuse", "tokens"] = "refuse"
    """What to do with a row that spells out a special token, such as </s>: reject it, or read it as that token."""
    repeated: Literal["exact", "folded"] = "exact"
    """Which rows are dropped as duplicates: those equal in input, target and label (`exact`), or those whose inputs
    differ at most in case and spacing (`folded`)."""
    text_train_file: Name | None = None
    """Extra text for transcoders and deltas, one per line. Null: generated if the rows are; else only the rows."""
    text_validation_file: Name | None = None
    copy_source: Literal["shipped", "c4"] = "shipped"
    max_reject_fraction: Fraction = 0.05
    operators: Annotated[str, Field(pattern=r"^[-+*/]+$")] = "+-*/"
    operand_min: Annotated[int, Field(ge=0)] = 1
    operand_max: Count = 999
    ood_operand_min: Annotated[int, Field(ge=0)] = 1000
    """Lowest operand of the out-of-distribution requests that go beyond the training range."""
    ood_operand_max: Count = 99999
    decimals: bool = False
    negatives: bool = False
    parentheses: bool = False
    """Also generate longer expressions, with parentheses."""

    @field_validator("separator", mode="before")
    @classmethod
    def _separator(cls, separator: object) -> object:
        if separator is None:
            raise ValueError("""must be text; a blank one needs quotes of its own: data.separator='" "'""")
        return separator

    @model_validator(mode="after")
    def _ranges(self) -> Data:
        for low, high in (("operand_min", "operand_max"), ("ood_operand_min", "ood_operand_max")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) must be below {high} ({getattr(self, high)})")
        return self


class LoraSpace(Section):
    """The LoRA study's dimensions. `alpha_over_r` scales the adapter: alpha = alpha_over_r * r."""

    r: Annotated[Dimension, whole(1)] = Choice(choice=[8, 16, 32])
    alpha_over_r: Annotated[Dimension, real(above=0)] = Choice(choice=[1.0, 2.0])
    lr: Annotated[Dimension, real(above=0)] = Range(low=1e-4, high=1e-3, log=True)
    dropout: Annotated[Dimension, real(below=1)] = 0.0
    weight_decay: Annotated[Dimension, real()] = 0.0
    batch_size: Annotated[Dimension, whole(1)] = 8
    targets: Annotated[Dimension, text()] = "all-linear"
    """PEFT target modules: `all-linear`, or names separated by commas."""
    schedule: Annotated[Dimension, text("linear", "cosine", "constant", "constant_with_warmup")] = "linear"


class Lora(Section, LoraTraining):  # type: ignore[misc]  # mypy does not see that sections are frozen
    FIRST = ("trials",)

    trials: Count = 16
    workers_per_trial: Count = 1
    """Processes that share each batch of a trial; each takes the CPUs and GPUs of one ordinary trial."""
    asha: bool = True
    grace_evals: Count = 1
    """Validations every trial gets before ASHA may stop it."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    sampler: Sampler = "tpe"
    warm_start: Name | None = None
    """An earlier sweep in the same Optuna storage; the best values of its study are tried first."""
    space: LoraSpace = LoraSpace()


class Activations(Section):
    train_tokens: Count = 1_000_000
    validation_tokens: Count = 50_000
    batch_tokens: Count = 4096
    """Padded tokens per forward pass of the capture."""
    max_length: Annotated[int, Field(ge=2)] = 256
    """Texts are truncated to this many tokens."""


class Transcoders(Section, BaseTraining):  # type: ignore[misc]
    FIRST = ("source", "convention", "layers", "width", "target_l0")

    source: Name = "train"
    """`train`, a local folder, or a hub repository in Gemma Scope's layout."""
    convention: Literal["ln2.hook_normalized", "resid_mid/sqrt(d_model)"] = "ln2.hook_normalized"
    """What the transcoders read: the residual stream in the middle of the block, divided by its rms (as in Gemma Scope)
    or by a constant, for checkpoints trained that way. If a file names its own taps, they must agree."""
    layers: Layers = "all"
    """Layers that get base transcoders and residual deltas."""
    width: str | Count = 16384
    """Features of a trained base transcoder, or the width label of a published one (such as 16k)."""
    target_l0: Annotated[list[Positive], Field(min_length=1), Distinct] = [16.0, 32.0, 64.0]
    """Mean active features per token; one base is trained for each value."""
    workers_per_layer: Count = 1
    """Processes that share each batch of a layer's bases; each takes the CPUs and GPUs of one ordinary layer."""


class DeltaSpace(Section):
    lr: Annotated[Dimension, real(above=0)] = Range(low=1e-3, high=1e-2, log=True)
    sparsity: Annotated[Dimension, real()] = Range(low=1e-4, high=1e-2, log=True)


class Deltas(Section, DeltaTraining):  # type: ignore[misc]
    FIRST = (
        *("targets", "sites", "layers", "percentiles", "target_l0", "d_new", "trials", "replicas"),
        *("side_by_side", "workers_per_trial"),
    )

    targets: Annotated[list[Literal["change", "residual"]], Field(min_length=1), Distinct] = ["change"]
    """What deltas are trained on: `change`, what finetuning changed at a site, or `residual`, the error of a base
    transcoder on the finetuned MLP (the reference study's way, which needs base transcoders)."""
    sites: Literal["auto"] | Annotated[list[Literal["qkv", "o", "mlp"]], Field(min_length=1), Distinct] = "auto"
    """Kinds of site that get change deltas: `mlp`; `qkv`, attention's queries, keys and values; `o`, attention's
    output. `auto`: those that finetuning changed. Residual deltas are for MLPs only."""
    layers: Layers = "all"
    """Layers that get change deltas; residual deltas use the layers of the base transcoders."""
    percentiles: Annotated[list[Fraction], Distinct] = [0.25, 0.5, 0.75]
    """Which base of each layer to use: index min(n - 1, int(n * p)) among its n candidates by ascending L0."""
    target_l0: Positive | None = None
    """Also use the base with the L0 nearest to this, which, unlike a percentile, gives every layer the same sparsity.
    Its rows have no percentile."""
    d_new: Annotated[list[Count], Field(min_length=1), Distinct] = [32, 64, 128]
    trials: Count = 8
    """Trials per group, that is, per layer, target, d_new, and base if there is one."""
    side_by_side: Literal["auto"] | Count = "auto"
    """How many trials of a group are trained side by side, so that each batch is read once for all of them. Applies to
    a group's first trials, which are random, and to all trials of the samplers `random` and `grid`. `auto` is 4 on a
    GPU and 1 on a CPU, where it repeats earlier results to the last digit."""
    workers_per_trial: Count = 1
    """Processes that share each batch of a trial; each takes the CPUs and GPUs of one ordinary trial."""
    asha: bool = True
    grace_evals: Count = 2
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    sampler: Sampler = "tpe"
    objectives: Literal["val_loss", "val_error, val_l0_delta"] = "val_loss"
    """What a study minimises; `val_error` is `val_unexplained` for change deltas and `val_fvu` for residual ones. With
    two objectives no trial is stopped early; the report marks the Pareto front of residual deltas, and `ui --studies`
    shows every study's. The delta with the lowest val_loss is still the one kept."""
    warm_start: Name | None = None
    """An earlier sweep in the same Optuna storage; the best values of its studies are tried first."""
    polish_steps: Annotated[int, Field(ge=0)] = 0
    """After the search: number of steps in which the kept change deltas of all layers are trained together, one width
    at a time, on the KL to the finetuned model at the training rows' targets. The deltas that do best on the validation
    rows are spliced in, and the report says so."""
    polish_lr: Positive = 3e-4
    space: DeltaSpace = DeltaSpace()

    @property
    def selections(self) -> list[float | None]:
        """The percentiles, plus None if a base is also chosen by target L0."""
        return [*self.percentiles, *([None] if self.target_l0 is not None else [])]

    @field_validator("percentiles")
    @classmethod
    def _two_decimals(cls, percentiles: list[float]) -> list[float]:
        if any(round(percentile, 2) != percentile for percentile in percentiles):
            raise ValueError(f"must have at most two decimals, got {percentiles}")
        return percentiles


Control: TypeAlias = Literal[CONTROLS]  # type: ignore[valid-type]  # CONTROLS is a constant, fixed at import


class Evaluate(Section):
    subsets: Annotated[list[str], Field(min_length=1), Distinct] | None = None
    """Labels whose rows are evaluated; null: all of them."""
    conditions: Annotated[list[Literal["raw", "no_delta", "full"]], Field(min_length=1), Distinct] = [
        "raw",
        "no_delta",
        "full",
    ]
    controls: Annotated[list[Control], Distinct] = []
    """Extra conditions, each of which rules out one alternative explanation and costs about as much as an alpha.
    `evaluators/conditions.py` says which deltas each applies to."""
    alphas: Annotated[list[Finite], Distinct] = [0.0, 0.25, 0.5, 0.75, 1.0]
    behaviours: Behaviours = {"exact": "equals_target"}
    """Checks of each generated text; every entry becomes a rate in the tables, `NAME_rate`. A check's name, or
    {CHECK: OPTION}; add `on: [SUBSETS]` to restrict it to some subsets."""
    expected: list[Expected] = []
    """What the finetuned model must do before its internals are worth a look: entries {behaviour: NAME, subset: LABEL,
    at_least: RATE} or at_most. Each becomes one of the report's checks."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end an answer, in addition to the model's own end of text."""
    sets: Sets = [LayerSet(layers="all"), LayerSet(layers="each")]
    """Which of a target's sites are spliced at once: `all`, `thirds` of the layers, `each`, or a list of layers, with
    all kinds of site; `qkv:all`, `mlp:thirds` and so on are restricted to one kind. An entry
    {layers: each, alphas: [], controls: false} has its own alphas and no controls. If two entries name the same sites,
    the later one wins."""
    cards: Annotated[int, Field(ge=0)] = 100
    """How many features get a card in the report, by largest estimated effect: what each reads and writes, and what it
    does alone. Only deltas of the first of `deltas.targets` get cards; residual deltas' are divided evenly among the
    layers. With 0, single features are not analysed."""
    parts: bool = True
    """With change deltas: first look at the two models (weights, where they diverge, what the mean change reads), and
    measure where the finetuning lives. Each part of the model (attention's patterns, values and output, the MLPs, the
    rest) and each third of the layers is un-finetuned alone, and finetuned alone."""
    curve: bool = True
    """With change deltas: also measure only the k most effective features of all layers, for k from 1 to all."""
    groups: Annotated[int, Field(ge=0)] = 12
    """With change deltas: put features that fire on the same tokens into groups, and measure all deltas without a
    group, the group alone, and the first few groups together, each against as many random features. This many groups
    are measured one by one, those with the largest estimated effects first. With 0, there are no groups."""
    graphs: Annotated[int, Field(ge=0)] = 3
    """With change deltas: for this many prompts, one of each subset in turn, draw which features act on each other and
    on the first token that the two models say differently. Each takes as long as some hundred passes of its text."""
    widths: bool = True
    """With change deltas of several `deltas.d_new`: also splice in every other width, in all layers at once at alpha 1,
    with the controls `dense_delta` and `pca_delta`, whose rank is d_new."""
    replicas: Count = 1
    """How many seeds of each kept trial are evaluated, best first; with more than one, intervals cover seeds as well as
    prompts."""
    percentile: Fraction | None = None
    """Base used for behaviour; null takes the (percentile, d_new) with the lowest mean validation error."""
    d_new: Count | None = None
    max_new_tokens: Count = 64
    batch_size: Count = 32

    @field_validator("conditions")
    @classmethod
    def _conditions(cls, conditions: list[str]) -> list[str]:
        if "raw" not in conditions:
            raise ValueError("must include raw: every other condition is compared with it")
        return conditions


class Compute(Section):
    cpus_per_trial: Count = 1
    gpus_per_trial: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """A fraction shares a GPU between trials; null is one GPU if there are any, else none."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Precision of training and capture; `auto` is bf16 if the device has fast bf16 arithmetic, else fp32."""
    max_concurrent: Count | None = None
    """Maximum number of trials or evaluation workers at once; null fills the machine."""
    max_retries: Annotated[int, Field(ge=0)] = 1
    """How often to retry a trial whose worker died."""
    checkpoint_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 30.0
    """Minimum time between checkpoints of a running trial; a killed trial resumes from its last one."""


class Storage(Section):
    root: Name = "mlruns"
    """Folder for everything a sweep writes; on a cluster it must be the same folder on every node."""
    budget_gb: Positive | None = None
    """Maximum disk for activations and base errors at once; null: half of the free space. If not all layers fit, they
    are captured, trained and deleted in windows: the results are the same, but each text is read once per window."""
    base_errors: Literal["auto", "kept", "recomputed"] = "auto"
    """The bases' errors on the finetuned outputs: kept on disk, or recomputed from outputs and base by each worker that
    reads them. `auto` recomputes on a GPU, where that should be faster than reading."""
    mirror: Name | None = None
    """Where to keep a second copy of the results: an fsspec URL (s3://bucket/runs). Results are uploaded as they are
    written; a machine without them downloads them and continues. On a cluster the root must still be shared."""
    tracking_uri: Name | None = None
    """MLflow tracking server; null is sqlite:///ROOT/mlflow.db."""
    optuna_url: Name | None = None
    """Optuna storage (postgresql://..., sqlite:///...); null is a journal file under ROOT/optuna/."""


class Machine(Section):
    """What `plan` assumes about a worker and its GPU before anything has been measured there; nothing else reads it.
    The defaults are for one H100 (`python -m benchmarks.gpu`), and for one CPU core where Python runs."""

    tflops: Positive = 90.0
    """Reached by bf16 matrix products, all overheads included."""
    kernel_us: Positive = 4.8
    """Microseconds per kernel of a delta step, within its CUDA graph."""
    layer_ms: Positive = 0.6
    """Python time per spliced layer in one evaluation pass, which the GPU waits for."""
    answer_passes: Count = 24
    """Single-token passes until every row of a batch has its answer."""
    row_tokens: Count = 64
    disk_gbs: Positive = 2.0
    """GB/s of the storage root, for all workers together."""
    pcie_gbs: Positive = 20.0
    trial_ms: Positive = 30.0
    """The driver's share of a delta trial."""
    start_s: Positive = 0.5
    """From the end of a trial to the first step of the next."""


class Sweep(Section):
    """All settings of a sweep."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: Model = Model()
    data: Data = Data()
    lora: Lora = Lora()
    activations: Activations = Activations()
    transcoders: Transcoders = Transcoders()
    deltas: Deltas = Deltas()
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()
    machine: Machine = Machine()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        bases, evaluate = self.transcoders, self.evaluate
        targets = self.deltas.targets
        if "residual" in targets and not self.deltas.selections:
            raise ValueError("deltas.percentiles: got [], must have at least one unless deltas.target_l0 is set")
        if "change" in targets and bases.convention != "ln2.hook_normalized":
            raise ValueError(
                f"transcoders.convention: got {bases.convention}, must be ln2.hook_normalized where deltas.targets "
                "holds change: a change is a function of what the MLP itself reads"
            )
        for expected in evaluate.expected:
            if expected.behaviour not in evaluate.behaviours:
                names = ", ".join(evaluate.behaviours)
                raise ValueError(f"evaluate.expected: there is no behaviour {expected.behaviour!r}; allowed: {names}")
        for control in (name for name in CONTROLS if name in evaluate.controls):
            if not set(CONDITIONS[control].targets) & set(targets):
                possible = " or ".join(CONDITIONS[control].targets)
                raise ValueError(f"evaluate.controls: {control} needs {possible} among deltas.targets, got {targets}")
        if self.deltas.objectives != "val_loss" and self.deltas.threshold == "calibrated":
            raise ValueError(
                "deltas.threshold: got calibrated, must be learned with two objectives: "
                "calibrated deltas all have the same L0"
            )
        if evaluate.replicas > self.deltas.replicas:
            few = f"at most deltas.replicas {self.deltas.replicas}"
            raise ValueError(f"evaluate.replicas: got {evaluate.replicas}, must be {few}")
        if evaluate.replicas > 1 and self.deltas.polish_steps:
            raise ValueError(
                f"evaluate.replicas: got {evaluate.replicas}, must be 1 with deltas.polish_steps, which trains the "
                "deltas of one seed together"
            )
        if "residual" in targets and bases.source == "train":
            if not isinstance(bases.width, int):
                raise ValueError(f"transcoders.width: got {bases.width!r}, must be a whole number for trained bases")
            if (most := max(bases.target_l0)) >= bases.width:
                raise ValueError(f"transcoders.target_l0: got {most:g}, must be below transcoders.width {bases.width}")
        layers_of = {"change": self.deltas.layers, "residual": bases.layers}
        lists = [layers_of[target] for target in targets]
        layers_swept = sorted({int(layer) for layers in lists if isinstance(layers, list) for layer in layers})
        for spliced in evaluate.sets if "all" not in lists else ():
            if isinstance(spliced.layers, list) and (stray := sorted(set(spliced.layers) - set(layers_swept))):
                raise ValueError(f"evaluate.sets: got layer {stray[0]}, but the deltas have layers {layers_swept}")
        for name, section in (("lora", self.lora), ("deltas", self.deltas)):
            ranges = [key for key in type(section.space).model_fields if isinstance(getattr(section.space, key), Range)]
            if section.sampler == "grid" and section.warm_start:
                raise ValueError(f"{name}.warm_start: a grid tries its combinations in its own order, so leave it out")
            if section.sampler == "grid" and ranges:
                raise ValueError(f"{name}.sampler: grid needs choices, but {name}.space.{ranges[0]} is a range")
            choices = [getattr(section.space, key) for key in type(section.space).model_fields]
            count = math.prod(len(choice.choice) for choice in choices if isinstance(choice, Choice))
            if section.sampler == "grid" and section.trials != count:
                raise ValueError(
                    f"{name}.trials: got {section.trials}, but the grid of {name}.space has {count} combinations"
                )
        for key, value, allowed in (
            ("percentile", evaluate.percentile, self.deltas.percentiles),
            ("d_new", evaluate.d_new, self.deltas.d_new),
        ):
            if value is not None and value not in allowed:
                name = "percentiles" if key == "percentile" else key
                raise ValueError(f"evaluate.{key}: got {value}, must be one of deltas.{name} {allowed}")
        return self
