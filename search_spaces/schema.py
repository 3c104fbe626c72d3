"""The settings of a sweep, typed.

In: plain values read from YAML and the command line. Out: a frozen `Sweep`, or a pydantic error that names the key.
The defaults here are the tool's defaults; the presets beside this file only list what differs.
"""

from __future__ import annotations

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
    """`smollm2-135m` (embedded), `tiny-gemma2` (random, for tests), a local folder, or a hub repository."""
    revision: Name | None = None
    finetuned: Name | None = None
    """A finetuned model to look at, instead of one that is trained here: a folder or hub repository that holds a full
    model of the same architecture and shape, or a PEFT adapter."""
    finetuned_revision: Name | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What the model is evaluated in. `auto`: bf16 on a GPU and fp32 on a CPU, unless `compute.precision` says another,
    and fp32 for the exactness checks. `bf16`, for large models, is for those too, which then allow what it rounds."""


class Data(Section):
    train_rows: Count = 10000
    """Rows of all labels together, in equal parts."""
    validation_rows: Count = 200
    eval_rows: Count = 100
    """Rows of each label, that is, of each evaluation subset."""
    text_train_lines: Count = 16200
    text_validation_lines: Count = 1800
    rows_file: Name | None = None
    """Your own rows instead of the generated ones: JSON, CSV, Parquet, or a hub dataset OWNER/NAME[:SPLIT]. Each label
    is a subset, at most 12. Rows without a target take the finetuned model's own answer (`model.finetuned`)."""
    evaluation_file: Name | None = None
    """Rows for evaluation alone; null takes them from `rows_file`."""
    columns: dict[Literal["input", "target", "label", "messages"], Name] = {}
    """What these are called in your files, where they have other names."""
    format: Literal["plain", "chat"] = "plain"
    """`chat` renders input or messages with the tokenizer's chat template; in `plain`, `separator` ends the input."""
    separator: str = "\n"
    """In the plain format, the text between input and target; may be empty."""
    rendering: Literal["conversation", "generation"] = "conversation"
    """Of chats: `conversation` splits the whole conversation, as training reads it, into prompt and target; the prompt
    of `generation` is the template's generation prompt, and the target the answer's text alone."""
    special_tokens: Literal["refuse", "tokens"] = "refuse"
    """What to do with a row that spells out a special token, such as </s>: reject it, or read it as that token."""
    repeated: Literal["exact", "folded"] = "exact"
    """Rows left out as copies: those equal in input, target and label, or (`folded`) those whose inputs differ at most
    in case and spacing."""
    text_train_file: Name | None = None
    """Further text for transcoders and deltas, one a line; null: generated with generated rows, else the rows alone."""
    text_validation_file: Name | None = None
    copy_source: Literal["shipped", "c4"] = "shipped"
    max_reject_fraction: Fraction = 0.05
    operators: Annotated[str, Field(pattern=r"^[-+*/]+$")] = "+-*/"
    operand_min: Annotated[int, Field(ge=0)] = 1
    operand_max: Count = 999
    ood_operand_min: Annotated[int, Field(ge=0)] = 1000
    """Operands of the out-of-distribution requests that go beyond the training range."""
    ood_operand_max: Count = 99999
    decimals: bool = False
    negatives: bool = False
    parentheses: bool = False
    """Also longer expressions, with parentheses."""

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
    """Processes that share each batch of a trial; each takes the CPUs and GPUs that a whole trial would otherwise."""
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
    """Padded tokens in one forward pass of the capture."""
    max_length: Annotated[int, Field(ge=2)] = 256
    """Captured texts are cut after this many tokens."""


class Transcoders(Section, BaseTraining):  # type: ignore[misc]
    FIRST = ("source", "convention", "layers", "width", "target_l0")

    source: Name = "train"
    """`train`, a local folder, or a hub repository in Gemma Scope's layout."""
    convention: Literal["ln2.hook_normalized", "resid_mid/sqrt(d_model)"] = "ln2.hook_normalized"
    """What the transcoders read: the residual stream in the middle of the block divided by its rms, as Gemma Scope's
    do, or by a constant, for checkpoints trained that way. A file that names its own taps must agree."""
    layers: Layers = "all"
    """Layers that get base transcoders, and residual deltas on them."""
    width: str | Count = 16384
    """Features of a trained base transcoder, or the width label of a published one (such as 16k)."""
    target_l0: Annotated[list[Positive], Field(min_length=1), Distinct] = [16.0, 32.0, 64.0]
    """Mean active features per token of the trained bases; one base for each value."""
    workers_per_layer: Count = 1
    """Processes that share each batch of a layer's bases; each takes what a whole layer would otherwise."""


class DeltaSpace(Section):
    lr: Annotated[Dimension, real(above=0)] = Range(low=1e-3, high=1e-2, log=True)
    sparsity: Annotated[Dimension, real()] = Range(low=1e-4, high=1e-2, log=True)


class Deltas(Section, DeltaTraining):  # type: ignore[misc]
    FIRST = (
        *("targets", "sites", "layers", "percentiles", "target_l0", "d_new", "trials", "replicas"),
        *("side_by_side", "workers_per_trial"),
    )

    targets: Annotated[list[Literal["change", "residual"]], Field(min_length=1), Distinct] = ["change"]
    """What deltas are trained on: `change`, what finetuning changed at a site, or `residual`, what a base transcoder
    leaves of the finetuned MLP (the reference study's way, which needs base transcoders)."""
    sites: Literal["auto"] | Annotated[list[Literal["qkv", "o", "mlp"]], Field(min_length=1), Distinct] = "auto"
    """Kinds of site of the change deltas: `mlp`; `qkv`, attention's queries, keys and values; `o`, attention's output.
    With `auto` those that finetuning changed. Residual deltas are of MLPs."""
    layers: Layers = "all"
    """Layers of the change deltas; residual deltas have those of the base transcoders."""
    percentiles: Annotated[list[Fraction], Distinct] = [0.25, 0.5, 0.75]
    """Which base of each layer to use: index min(n - 1, int(n * p)) among its n candidates by ascending L0."""
    target_l0: Positive | None = None
    """Also use the base with the nearest L0: unlike a percentile, this means the same sparsity on every layer. Its rows
    have no percentile."""
    d_new: Annotated[list[Count], Field(min_length=1), Distinct] = [32, 64, 128]
    trials: Count = 8
    """Trials of each group: layer, target, d_new, and base where there is one."""
    side_by_side: Literal["auto"] | Count = "auto"
    """Trials of a group trained side by side, so that every batch is read once for all of them: its first, random ones,
    and any of the samplers `random` and `grid`. With `auto`, 4 on a GPU; on a CPU 1, which repeats earlier results to
    the last digit."""
    workers_per_trial: Count = 1
    """Processes that share each batch of a trial; each takes the CPUs and GPUs that a whole trial would otherwise."""
    asha: bool = True
    grace_evals: Count = 2
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    sampler: Sampler = "tpe"
    objectives: Literal["val_loss", "val_error, val_l0_delta"] = "val_loss"
    """What a study minimises; `val_error` is `val_unexplained` of change deltas, `val_fvu` of residual ones. With two
    objectives no trial is stopped early, the report marks the Pareto front, and the delta that is kept is still the one
    of lowest val_loss."""
    warm_start: Name | None = None
    """An earlier sweep in the same Optuna storage; the best values of its studies are tried first."""
    polish_steps: Annotated[int, Field(ge=0)] = 0
    """After the search: so many steps in which the kept change deltas of all layers, width by width, are trained
    together on the KL to the finetuned model at the training rows' targets. What is best on the validation rows is
    spliced in, and the report says so."""
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


Control: TypeAlias = Literal[CONTROLS]  # type: ignore[valid-type]  # they are known when this is imported


class Evaluate(Section):
    subsets: Annotated[list[str], Field(min_length=1), Distinct] | None = None
    """Labels whose rows are evaluated; null: all of them."""
    conditions: Annotated[list[Literal["raw", "no_delta", "full"]], Field(min_length=1), Distinct] = [
        "raw",
        "no_delta",
        "full",
    ]
    controls: Annotated[list[Control], Distinct] = []
    """Further conditions, each of which rules out one other explanation; every one costs about as much as an alpha.
    `evaluators/conditions.py` says which deltas each is for."""
    alphas: Annotated[list[Finite], Distinct] = [0.0, 0.25, 0.5, 0.75, 1.0]
    behaviours: Behaviours = {"exact": "equals_target"}
    """What is asked of each generated text; every entry becomes a rate in the tables, `NAME_rate`. A check's name, or
    {CHECK: OPTION}, with `on: [SUBSETS]` where it is asked of some subsets alone."""
    expected: list[Expected] = []
    """What the finetuned model must do before its internals are worth a look: entries {behaviour: NAME, subset: LABEL,
    at_least: RATE} or at_most. Each becomes one of the report's checks."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end an answer, beside the model's own end of text."""
    sets: Sets = [LayerSet(layers="all"), LayerSet(layers="each")]
    """Sets of sites that are spliced at once, of each target's: `all`, `thirds` of the layers, `each`, or a list of
    layers, with all kinds of site; `qkv:all`, `mlp:thirds` and so on are of one kind. An entry
    {layers: each, alphas: [], controls: false} has alphas of its own and no controls. A later entry of the same sites
    wins."""
    cards: Annotated[int, Field(ge=0)] = 100
    """Features that get a card in the report, those of largest estimated effect: what they read and write, and what
    each does alone. They are of the first of `deltas.targets`; of residual deltas, as many in each layer. With 0 no
    feature is looked at."""
    parts: bool = True
    """With change deltas: first also measure where the finetuning lives. Each part of the model (attention's patterns,
    values and output, the MLPs, the rest), and each third of the layers, is un-finetuned alone, and finetuned alone."""
    curve: bool = True
    """With change deltas: also keep only the k most effective features of all layers, k from 1 to all of them."""
    widths: bool = True
    """With change deltas of several `deltas.d_new`: also splice in those of every other width, in all layers at once at
    alpha 1, and of the controls `dense_delta` and `pca_delta`, whose rank is d_new."""
    replicas: Count = 1
    """How many seeds of each kept trial have their behaviour measured, best first; with more than one, intervals cover
    seeds as well as prompts."""
    percentile: Fraction | None = None
    """Base used for behaviour; null takes the (percentile, d_new) of the lowest mean validation error."""
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
    """A fraction shares a GPU between trials; null means one GPU if there are GPUs, else none."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Precision of training and capture; `auto` is bf16 if the device has fast bf16 arithmetic, else fp32."""
    max_concurrent: Count | None = None
    """Most trials or evaluation workers at once; null fills the machine."""
    max_retries: Annotated[int, Field(ge=0)] = 1
    """How often to retry a trial whose worker died."""
    checkpoint_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 30.0
    """A running trial saves a checkpoint at most this often; a killed one continues from there."""


class Storage(Section):
    root: Name = "mlruns"
    """Folder for everything a sweep writes; on a cluster it must be the same folder on every node."""
    budget_gb: Positive | None = None
    """Most disk for activations and base errors at once; null: half of what is free. Where those of all layers
    do not fit, layers are captured, trained and deleted in windows: the results are the same, and a text is read once
    a window."""
    base_errors: Literal["auto", "kept", "recomputed"] = "auto"
    """What bases leave of the finetuned outputs: kept on disk, or recomputed from outputs and base by each worker that
    reads it. `auto` recomputes on a GPU, where that should be faster than reading."""
    mirror: Name | None = None
    """Where to keep a second copy of the results: an fsspec URL (s3://bucket/runs). They are sent as they are written;
    a machine that has none of them fetches them and continues. On a cluster the root must still be shared."""
    tracking_uri: Name | None = None
    """MLflow tracking server; null is sqlite:///ROOT/mlflow.db."""
    optuna_url: Name | None = None
    """Optuna storage (postgresql://..., sqlite:///...); null is a journal file under ROOT/optuna/."""


class Machine(Section):
    """What `plan` assumes of a worker and its GPU before anything was measured there; nothing else reads it. The
    defaults are of one H100 (`python -m benchmarks.gpu`), and of one core for Python."""

    tflops: Positive = 90.0
    """Reached in products in bf16, all overheads included."""
    kernel_us: Positive = 4.8
    """A kernel of a delta step, within its CUDA graph."""
    layer_ms: Positive = 0.6
    """The Python of a spliced layer in one pass of evaluation, which the GPU waits for."""
    answer_passes: Count = 24
    """Passes over single tokens until every row of a batch has its answer."""
    row_tokens: Count = 64
    disk_gbs: Positive = 2.0
    """Of the storage root, for all workers together."""
    pcie_gbs: Positive = 20.0
    trial_ms: Positive = 30.0
    """The driver's part of a delta trial."""
    start_s: Positive = 0.5
    """From a trial's end to the next one's first step."""


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
        for control in (one for one in CONTROLS if one in evaluate.controls):
            if not set(CONDITIONS[control].targets) & set(targets):
                needed = " or ".join(CONDITIONS[control].targets)
                raise ValueError(f"evaluate.controls: {control} needs {needed} among deltas.targets, got {targets}")
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
        named = {"change": self.deltas.layers, "residual": bases.layers}
        lists = [named[target] for target in targets]
        known = sorted({int(layer) for layers in lists if isinstance(layers, list) for layer in layers})
        for one in evaluate.sets if "all" not in lists else ():
            if isinstance(one.layers, list) and (stray := sorted(set(one.layers) - set(known))):
                raise ValueError(f"evaluate.sets: got layer {stray[0]}, the deltas have layers {known}")
        for name, section in (("lora", self.lora), ("deltas", self.deltas)):
            ranges = [key for key in type(section.space).model_fields if isinstance(getattr(section.space, key), Range)]
            if section.sampler == "grid" and ranges:
                raise ValueError(f"{name}.sampler: grid needs choices, and {name}.space.{ranges[0]} is a range")
        for key, given, allowed in (
            ("percentile", evaluate.percentile, self.deltas.percentiles),
            ("d_new", evaluate.d_new, self.deltas.d_new),
        ):
            if given is not None and given not in allowed:
                name = "percentiles" if key == "percentile" else key
                raise ValueError(f"evaluate.{key}: got {given}, must be one of deltas.{name} {allowed}")
        return self
