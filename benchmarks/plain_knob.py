"""Recomputes rows of a sweep's tables from its files alone, with the plain transformers code of docs/formats.md.

    python -m benchmarks.plain_knob study-s0 [--root mlruns] [--csv FILE]

In: the name of a finished sweep with change deltas in all layers, of a model that is built here. Out: prints, for every
subset, the cross-entropy by hand and the sweep's own: at every strength, with un-finetuned MLPs in the finetuned model,
and with the first groups of features alone. Fails if the largest difference exceeds rounding.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.rows import Row, read_rows
from evaluators.tables.recovery import widest_set

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
ROUNDING = 1e-4
COLUMNS = ["what", "subset", "by_hand", "of_the_sweep"]


def blocks() -> list[str]:
    """The page's two programs: the one that loads the files, and the knob."""
    return CODE.findall(PAGE.read_text(encoding="utf-8"))


def cross_entropy(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Nats per target token, one row at a time."""
    nats = tokens = 0.0
    for row in rows:
        prompt = [tokenizer.bos_token_id, *tokenizer(row.input + "\n", add_special_tokens=False)["input_ids"]]
        target = [*tokenizer(row.target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            output = model(torch.tensor([prompt + target]), logits_to_keep=len(target) + 1)
        logits = output.logits[0, :-1].log_softmax(-1)
        nats -= logits.gather(1, torch.tensor(target).unsqueeze(1)).sum().item()
        tokens += len(target)
    return nats / tokens


@contextmanager
def named_as_on_the_page(sweep: Path, models: Path) -> Iterator[None]:
    """Runs in a folder with the names of the page's code: this sweep is `quickstart`, and `models` has its model."""
    name = Path(yaml.safe_load((sweep / "sweep.yaml").read_text())["model"]["source"]).name
    (model,) = [folder for folder in models.glob(f"{name}-*") if folder.is_dir() and folder.suffix != ".tmp"]
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "mlruns"
        for place, source in {"sweeps/quickstart": sweep, "models/smollm2-135m-here": model}.items():
            (home / place).parent.mkdir(parents=True)
            (home / place).symlink_to(source.resolve())
        with chdir(scratch):
            yield


def spliced(sweep: Path, models: Path) -> dict[str, Any]:
    """What the page's second program defines: `model`, `tokenizer`, and `alpha`, which may be set."""
    names: dict[str, Any] = {}
    with named_as_on_the_page(sweep, models):
        exec(compile(blocks()[1], str(PAGE), "exec"), names)
    return names


def evaluation_rows(sweep: Path, subset: str) -> list[Row]:
    return [row for row in read_rows(sweep / "data/evaluation.jsonl") if row.label == subset]


def compare(sweep: Path, models: Path, alphas: Sequence[float] | None = None) -> pd.DataFrame:
    """`what, subset, by_hand, of_the_sweep`: cross-entropies of the change deltas of all layers at these strengths."""
    tables = {
        name: pd.read_csv(sweep / f"report/{name}.csv", dtype={"layer": str}) for name in ("gaps", "exp2B_metrics")
    }
    gaps, doses = (table[table["target"] == "change"] for table in tables.values())
    doses = doses[(doses["condition"] == "alpha") & (doses["layer"] == widest_set(gaps))]
    names, records = spliced(sweep, models), []
    for alpha, alpha_rows in doses.groupby("alpha"):
        if alphas is None or alpha in alphas:
            names["alpha"] = alpha
            for subset, expected in alpha_rows.set_index("subset")["mean_ce"].items():
                by_hand = cross_entropy(names["model"], names["tokenizer"], evaluation_rows(sweep, subset))
                records.append((f"alpha {alpha}", subset, by_hand, expected))
    return pd.DataFrame(records, columns=COLUMNS)


def compare_parts(sweep: Path, models: Path) -> pd.DataFrame:
    """The same columns: the finetuned model with the MLPs of the un-finetuned one."""
    parts = pd.read_csv(sweep / "report/parts.csv")
    parts = parts[(parts["part"] == "mlp") & (parts["way"] == "unfinetuned") & (parts["layers"] == "all")]
    with named_as_on_the_page(sweep, models):
        folders = Path("mlruns/sweeps/quickstart/lora/merged"), next(Path("mlruns/models").iterdir())
        model, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
        tokenizer = AutoTokenizer.from_pretrained(folders[0])
    for block, before in zip(model.model.layers, other.model.layers, strict=True):
        block.mlp = before.mlp
    records = [
        ("un-finetuned MLPs", subset, cross_entropy(model, tokenizer, evaluation_rows(sweep, subset)), expected)
        for subset, expected in parts.set_index("subset")["mean_ce"].items()
    ]
    return pd.DataFrame(records, columns=COLUMNS)


def compare_groups(sweep: Path, models: Path, count: int) -> pd.DataFrame:
    """The same columns: the first groups of features alone, on the prompts on which groups are measured."""
    few = pd.read_csv(sweep / "report/few_groups.csv")
    few = few[(few["groups"] == count) & ~few["random"]].set_index("subset")
    if few.empty:
        raise typer.BadParameter(f"{sweep.name} has not measured {count} groups together", param_hint="--groups")
    with groups_alone(sweep, count) as copy:
        names = spliced(copy, models)
    records = []
    for subset, expected in few.iterrows():
        rows = evaluation_rows(sweep, str(subset))[: int(expected["n"])]
        by_hand = cross_entropy(names["model"], names["tokenizer"], rows)
        records.append((f"first {count} groups", subset, by_hand, expected["mean_ce"]))
    return pd.DataFrame(records, columns=COLUMNS)


@contextmanager
def groups_alone(sweep: Path, count: int) -> Iterator[Path]:
    """A copy of a sweep in which all features but those of the first groups, and those at BOS, write nothing."""
    (file,) = sweep.glob("cells/grouping_*.json")
    groups = json.loads(file.read_text())["groups"][:count]
    chosen = {(str(site), feature) for group in groups for site, feature in group["features"]}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "sweep"
        shutil.copytree(sweep / "deltas", copy / "deltas", ignore=shutil.ignore_patterns("*.html", "files.json"))
        for path in sweep.iterdir():
            if path.name != "deltas":
                (copy / path.name).symlink_to(path.resolve())
        for path in copy.glob("deltas/layer_*/change/d*/trial_*/delta.safetensors"):
            number, dot, kind = path.relative_to(copy).parts[1].removeprefix("layer_").partition(".")
            delta, site = load_file(path), f"{int(number)}{dot}{kind}"
            for feature in range(len(delta["threshold"])):
                if (site, feature) not in chosen and delta["threshold"][feature].isfinite():
                    delta["W_dec"][feature] = 0
            save_file(delta, path)
        yield copy


def main(
    name: Annotated[str, typer.Argument(help="The sweep's name.")],
    root: Annotated[Path, typer.Option(help="The storage root.")] = Path("mlruns"),
    groups: Annotated[int, typer.Option(help="How many groups of features are tried alone.")] = 4,
    csv: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    where = root / "sweeps" / name, root / "models"
    table = pd.concat([compare_parts(*where), compare(*where), compare_groups(*where, groups)])
    typer.echo(table.round(5).to_string(index=False))
    if csv is not None:
        table.round(5).to_csv(csv, index=False)
    apart = ((table["by_hand"] - table["of_the_sweep"]).abs() / table["of_the_sweep"]).max()
    typer.echo(f"at most {apart:.1e} apart, of the cross-entropy")
    if not apart <= ROUNDING or table.isna().any(axis=None):  # a CE that is no number agrees with nothing
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
