"""The settings of a sweep, typed.

In: plain values read from YAML and the command line. Out: a frozen `Sweep`, or a pydantic error that names the key.
Every default here is the default of the tool; the presets beside this file only say where they differ.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from search_spaces.dimensions import STRICT, Choice, Dimension, Finite, Range, real, text, whole

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def _distinct(values: Any) -> Any:
    if isinstance(values, list) and len(set(values)) != len(values):
        raise ValueError(f"one is named twice in {values}")
    return values


Distinct = AfterValidator(_distinct)
"""No entry of a list twice: two groups or cells of one name would overwrite each other."""
Layers = Annotated[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Literal["all"], Distinct]


Sampler = Literal["tpe", "gp", "random", "grid"]
"""How a study proposes: `grid` tries every combination of choices, so it needs choices alone."""


class Section(BaseModel):
    model_config = STRICT


class Model(Section):
    source: str = "smollm2-135m"
    """`smollm2-135m` (embedded), `tiny-gemma2` (random, for tests), a local folder, or a hub repository."""
    revision: str | None = None


class Data(Section):
    tool_rows: Count = 5000
    copy_rows: Count = 5000
    validation_rows: Count = 200
    eval_rows: Count = 100
    """Rows of each evaluation subset (tool, copy, tool_ood)."""
    text_train_lines: Count = 16200
    text_validation_lines: Count = 1800
    rows_file: str | None = None
    """A user's own JSONL rows {input, target, label}, in place of the generated ones."""
    text_train_file: str | None = None
    text_validation_file: str | None = None
    copy_source: Literal["shipped", "c4"] = "shipped"
    max_reject_fraction: Fraction = 0.05
    operators: Annotated[str, Field(pattern=r"^[-+*/]+$")] = "+-*/"
    operand_min: Annotated[int, Field(ge=0)] = 1
    operand_max: Count = 999
    ood_operand_min: Annotated[int, Field(ge=0)] = 1000
    """Operands of the out-of-distribution requests that leave the trained range."""
    ood_operand_max: Count = 99999
    decimals: bool = False
    negatives: bool = False
    parentheses: bool = False
    """Longer expressions."""

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
    """PEFT target modules: `all-linear`, or names joined by commas."""
    schedule: Annotated[Dimension, text("linear", "cosine", "constant", "constant_with_warmup")] = "linear"


class Lora(Section):
    trials: Count = 16
    steps: Count = 400
    epochs: Count | None = None
    """Passes over the training rows, in place of `steps`."""
    eval_every: Count = 50
    """Optimiser steps between validations; ASHA may stop a trial at each."""
    patience: Count | None = None
    """Validations without a better loss after which a trial ends itself; null never does."""
    accumulate: Count = 1
    """Pieces in which a batch is computed: less memory, the same steps."""
    gradient_checkpointing: bool = False
    """Less memory and more time, the same steps."""
    warmup_fraction: Fraction = 0.05
    grad_clip: Positive = 1.0
    loss_on: Literal["target", "everything"] = "target"
    workers_per_trial: Count = 1
    """Processes that share each batch of a trial; each takes the CPUs and GPUs that a trial takes otherwise."""
    asha: bool = True
    grace_evals: Count = 1
    """Validations every trial gets before ASHA may stop it."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    sampler: Sampler = "tpe"
    warm_start: str | None = None
    """An earlier sweep in the same Optuna storage, the best values of whose study are tried first."""
    space: LoraSpace = LoraSpace()


class Activations(Section):
    train_tokens: Count = 1_000_000
    validation_tokens: Count = 50_000
    batch_tokens: Count = 4096
    """Padded tokens in one forward pass of the capture."""
    max_length: Annotated[int, Field(ge=2)] = 256
    """Tokens after which a captured text is cut."""


class Transcoders(Section):
    source: str = "train"
    """`train`, a local folder, or a hub repository in Gemma Scope's layout."""
    convention: Literal["ln2.hook_normalized", "resid_mid/sqrt(d_model)"] = "ln2.hook_normalized"
    """What the transcoders read: the residual stream in the middle of the block over its rms, as Gemma Scope's do, or
    over a constant, to read checkpoints that were made so. A file that names its own taps must agree."""
    layers: Layers = "all"
    width: str | Count = 16384
    """Features of a trained base transcoder, or the width label of a published one (such as 16k)."""
    target_l0: Annotated[list[Positive], Field(min_length=1), Distinct] = [16.0, 32.0, 64.0]
    """Mean active features a token of the trained bases; one base for each."""
    epochs: Count = 4
    batch_size: Count = 2048
    lr: Positive = 1e-3


class DeltaSpace(Section):
    lr: Annotated[Dimension, real(above=0)] = Range(low=1e-3, high=1e-2, log=True)
    sparsity: Annotated[Dimension, real()] = Range(low=1e-4, high=1e-2, log=True)


class Deltas(Section):
    percentiles: Annotated[list[Fraction], Distinct] = [0.25, 0.5, 0.75]
    """Which base of a layer: index min(n - 1, int(n * p)) among its n candidates by ascending L0."""
    target_l0: Positive | None = None
    """Also the base whose L0 is nearest to this one: unlike a percentile it means the same sparsity on every layer. Its
    rows have no percentile."""
    d_new: Annotated[list[Count], Field(min_length=1), Distinct] = [32, 64, 128]
    trials: Count = 8
    """Trials of each (layer, percentile, d_new) group."""
    replicas: Count = 1
    """Seeds trained side by side in every trial; the trial's value is their mean."""
    epochs: Count = 4
    batch_size: Count = 2048
    l0_budget: Positive = 16.0
    """Active delta features a token above which `val_loss` is penalised."""
    threshold: Literal["learned", "calibrated"] = "calibrated"
    """Moved at every step so that nearly all of the L0 budget is spent, which makes deltas comparable at equal L0, or
    learned by a straight-through gradient, where `sparsity` decides how much of it is."""
    sparsity_warmup_fraction: Fraction = 0.2
    lr_warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    grad_clip: Positive = 1.0
    patience: Count = 4
    """Validations without improvement after which a trial stops itself."""
    asha: bool = True
    grace_evals: Count = 2
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    sampler: Sampler = "tpe"
    objectives: Literal["val_loss", "val_fvu, val_l0_delta"] = "val_loss"
    """What a study minimises. With two objectives no trial is stopped early, the report marks the Pareto front, and the
    delta that is kept is still the one of lowest val_loss."""
    warm_start: str | None = None
    """An earlier sweep in the same Optuna storage, the best values of whose studies are tried first."""
    space: DeltaSpace = DeltaSpace()

    @property
    def selections(self) -> list[float | None]:
        """The percentiles, and None where a base is chosen by its target L0."""
        return [*self.percentiles, *([None] if self.target_l0 is not None else [])]

    @field_validator("percentiles")
    @classmethod
    def _two_decimals(cls, percentiles: list[float]) -> list[float]:
        if any(round(percentile, 2) != percentile for percentile in percentiles):
            raise ValueError(f"must have at most two decimals, got {percentiles}")
        return percentiles


class Evaluate(Section):
    subsets: Annotated[list[Literal["tool", "copy", "tool_ood"]], Field(min_length=1), Distinct] = [
        "tool",
        "copy",
        "tool_ood",
    ]
    conditions: Annotated[list[Literal["raw", "no_delta", "full"]], Field(min_length=1), Distinct] = [
        "raw",
        "no_delta",
        "full",
    ]
    controls: Annotated[
        list[Literal["base_model_no_delta", "mlp_swap", "random_delta", "shuffled_delta", "dense_delta", "error_term"]],
        Distinct,
    ] = []
    """Further conditions, each of which rules out one other explanation; every one costs about as much as an alpha."""
    alphas: Annotated[list[Finite], Distinct] = [0.0, 0.25, 0.5, 0.75, 1.0]
    alpha_layers: Layers = "all"
    """Layers of the dose-response; `all` is every swept layer."""
    joint: bool = True
    """Also splice all swept layers at once."""
    features: Annotated[int, Field(ge=0)] = 4
    """Features of each layer's delta that are ablated one at a time, those of largest estimated effect; with 0 no
    feature is looked at."""
    replicas: Count = 1
    """Seeds of each kept trial whose behaviour is measured, the best first; intervals then cover seeds as well as
    prompts."""
    percentile: Fraction | None = None
    """Base used for behaviour; null takes the (percentile, d_new) of the lowest mean validation FVU."""
    d_new: Count | None = None
    max_new_tokens: Count = 64
    batch_size: Count = 32

    @field_validator("conditions")
    @classmethod
    def _conditions(cls, conditions: list[str]) -> list[str]:
        if "raw" not in conditions:
            raise ValueError("must hold raw: every other condition is compared with it")
        return conditions


class Compute(Section):
    cpus_per_trial: Count = 1
    gpus_per_trial: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """A fraction shares a GPU between trials; null is one GPU where there are GPUs, else none."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Of training and capture; `auto` is bf16 where the device has fast bf16 arithmetic, else fp32."""
    max_concurrent: Count | None = None
    """Trials or evaluation workers at once; null fills the machine."""
    max_retries: Annotated[int, Field(ge=0)] = 1
    """Further tries of a trial whose worker died."""
    checkpoint_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 30.0
    """A running trial keeps a checkpoint at most this often; a killed one goes on from there."""


class Storage(Section):
    root: str = "mlruns"
    """Folder of everything a sweep leaves behind; on a cluster it must be the same folder on every node."""
    mirror: str | None = None
    """Where results are also kept: an fsspec URL (s3://bucket/runs). Sent as they land; a machine that has none of them
    fetches them and goes on. On a cluster the root must be shared all the same."""
    tracking_uri: str | None = None
    """MLflow tracking server; null is sqlite:///ROOT/mlflow.db."""
    optuna_url: str | None = None
    """Optuna storage (postgresql://..., sqlite:///...); null is a journal file under ROOT/optuna/."""


class Sweep(Section):
    """A whole study."""

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
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        bases, evaluate = self.transcoders, self.evaluate
        if not self.deltas.selections:
            raise ValueError("deltas.percentiles: got [], must hold one at least where deltas.target_l0 is not set")
        if self.deltas.objectives != "val_loss" and self.deltas.threshold == "calibrated":
            raise ValueError(
                "deltas.threshold: got calibrated, must be learned with two objectives: "
                "calibrated deltas all spend the same L0"
            )
        if evaluate.replicas > self.deltas.replicas:
            few = f"at most deltas.replicas {self.deltas.replicas}"
            raise ValueError(f"evaluate.replicas: got {evaluate.replicas}, must be {few}")
        if bases.source == "train":
            if not isinstance(bases.width, int):
                raise ValueError(f"transcoders.width: got {bases.width!r}, must be a whole number for trained bases")
            if (most := max(bases.target_l0)) >= bases.width:
                raise ValueError(f"transcoders.target_l0: got {most:g}, must be below transcoders.width {bases.width}")
        if isinstance(bases.layers, list) and isinstance(evaluate.alpha_layers, list):
            stray = sorted(set(evaluate.alpha_layers) - set(bases.layers))
            if stray:
                raise ValueError(
                    f"evaluate.alpha_layers: got {stray}, must be some of transcoders.layers {bases.layers}"
                )
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
