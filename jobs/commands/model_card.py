"""The model card of an export: a `README.md` with the hub's metadata, so that the folder can be uploaded as it is.

In: a `Context`, and what is exported. Out: the card's text: both models, layers, width and sparsity, what the sweep
measured for exactly these deltas, and how to load them. It contains no paths of this machine.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jobs.context.context import Context, error_name
from jobs.files import MANIFEST, read_json
from models.adapters import is_adapter
from models.sources import repository_of
from sites import Address, Ground, Kind, Site, sites_label

TEMPLATE = "model_card.md.jinja"
TAGS = ["transcoder", "mechanistic-interpretability", "deltascope"]


class Exported(NamedTuple):
    """The content of an export: its format, the deltas' ground and width, the sites, the strength folded in, whether
    change deltas are fused with bases, and in words which features are on (empty: all)."""

    kind: str
    ground: Ground
    d_new: int
    sites: list[Site]
    alpha: float
    onto_bases: bool
    features: str = ""


def model_card(context: Context, exported: Exported) -> str:
    """The text of README.md."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        metadata=yaml.safe_dump(_metadata(context, exported.kind), sort_keys=False),
        base_model=_shown(context.settings.model.source),
        finetuned_model=_finetuned(context),
        local_name=hub_name(context) is None,
        kind=exported.kind,
        target=exported.ground.target,
        onto_bases=exported.onto_bases,
        layers=sites_label(exported.sites),
        first=min(exported.sites).label,
        d_new=exported.d_new,
        alpha=f"{exported.alpha:g}",
        kinds=_kinds(context, exported),
        features=exported.features,
        sweep=context.settings.name,
        figures=[] if exported.features else _figures(context, exported),
        deltas=_deltas(context, exported),
        polished=exported.ground.target == "change" and context.settings.deltas.polish_steps > 0,
    )


def _kinds(context: Context, exported: Exported) -> dict[str, Kind]:
    """The kinds of site that are exported, by their sites' labels; that of the first site comes first."""
    if exported.ground.target == "residual":
        return {sites_label(exported.sites): context.mlp_kind}
    kinds = dict.fromkeys(site.kind for site in sorted(exported.sites))
    return {sites_label([site for site in exported.sites if site.kind == kind]): kind for kind in kinds}


def hub_name(context: Context) -> str | None:
    """The finetuned model's hub repository, if it is a whole model from the hub."""
    finetuned, adopted = context.settings.model.finetuned, context.adopted
    return repository_of(finetuned) if finetuned and adopted and not is_adapter(adopted) else None


def _metadata(context: Context, kind: str) -> dict[str, Any]:
    """The hub's metadata, without a licence, which only the user knows, or a base model that is not on the hub."""
    metadata: dict[str, Any] = {}
    if base := repository_of(context.settings.model.source):
        metadata |= {"base_model": base, "base_model_relation": "adapter"}
    if kind == "saelens":
        metadata["library_name"] = "saelens"
    return metadata | {"tags": [*TAGS, *([kind] if kind == "circuit-tracer" else [])]}


def _shown(source: str) -> str:
    """A model's public name."""
    return repository_of(source) or Path(source).name


def _finetuned(context: Context) -> str:
    """The finetuned model's origin, with the settings if it was trained here."""
    settings = context.settings
    if settings.model.finetuned:
        kind = "an adapter, merged" if context.adopted and is_adapter(context.adopted) else "a whole model"
        return f"{_shown(settings.model.finetuned)} ({kind})"
    best = read_json(context.space.lora / "best.json") or {"params": {}}
    params = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in best["params"].items()
    )
    return f"LoRA trained by the sweep ({params})"


def _figures(context: Context, exported: Exported) -> list[dict[str, str]]:
    """A row for each subset for which the report's tables have a gap and the share that these deltas recover."""
    from jobs.commands.finished_sweeps import read_table

    if not (context.space.report / MANIFEST).is_file():
        return []  # a stage before it has run again, and its tables are of earlier deltas
    gaps, recovered = (read_table(context.space.report / f"{name}.csv", name) for name in ("gaps", "recovered"))
    if gaps is None or recovered is None:
        return []
    place = {"target": exported.ground.target, "layer": sites_label(exported.sites)}
    condition = "full" if exported.alpha == 1 else "alpha"
    deltas = {"condition": condition, "alpha": exported.alpha, "d_new": exported.d_new}
    if exported.ground.percentile is not None:
        deltas["percentile"] = exported.ground.percentile
    gaps, recovered = _rows(gaps, place), _rows(recovered, {**place, **deltas})
    rows = []
    for _, gap in gaps[gaps["metric"] == "mean_ce"].iterrows():
        by_metric = recovered[recovered["subset"] == gap["subset"]].set_index("metric")
        if "mean_ce" not in by_metric.index:
            continue
        shares = {
            metric: _interval(by_metric.loc[metric], "recovered") if metric in by_metric.index else "-"
            for metric in ("mean_ce", "kl")
        }
        ends = {
            "subset": gap["subset"],
            "gap": _interval(gap, "gap"),
            "prompts": str(by_metric.loc["mean_ce", "n_examples"]),
        }
        rows.append({**ends, **shares})
    return rows


def _rows(table: Any, values: dict[str, Any]) -> Any:
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def _interval(row: Any, column: str) -> str:
    value, low, high = (float(row[f"{column}{end}"]) for end in ("", "_low", "_high"))
    return "nothing to recover" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _deltas(context: Context, exported: Exported) -> list[dict[str, str]]:
    """L0 and error of each layer's kept delta on the validation text."""
    rows = []
    for site in exported.sites:
        group = Address(site, exported.ground, exported.d_new)
        best = context.best_of(group)
        assert best is not None, "it has just been exported"
        figures = best["figures"]
        unexplained = figures[error_name(exported.ground.target)]
        rows.append({"layer": site.label, "l0": f"{figures['val_l0_delta']:.1f}", "unexplained": f"{unexplained:.3f}"})
    return rows
