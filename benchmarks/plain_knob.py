"""Recomputes a sweep's main table from its files alone, with the plain transformers code of docs/formats.md.

    python -m benchmarks.plain_knob study-s2 [--root mlruns] [--csv FILE]

In: the name of a finished sweep with change deltas in all layers, of a model that is built here. Out: prints, for every
subset and strength, the cross-entropy by hand and the sweep's own, and the largest difference; fails if that exceeds
rounding.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from data.rows import Row, read_rows
from evaluators.tables.recovery import widest_set

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
ROUNDING = 1e-4


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
            logits = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        nats -= logits[len(prompt) - 1 : -1].gather(1, torch.tensor(target).unsqueeze(1)).sum().item()
        tokens += len(target)
    return nats / tokens


@contextmanager
def named_as_on_the_page(sweep: Path, models: Path) -> Iterator[None]:
    """Runs in a folder with the names of the page's code: this sweep is `quickstart`, and `models` has its model."""
    (model,) = [folder for folder in models.iterdir() if folder.is_dir() and not folder.name.endswith(".tmp")]
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "mlruns"
        for place, source in {"sweeps/quickstart": sweep, "models/smollm2-135m-here": model}.items():
            (home / place).parent.mkdir(parents=True)
            (home / place).symlink_to(source.resolve())
        with chdir(scratch):
            yield


def compare(sweep: Path, models: Path, alphas: Sequence[float] | None = None) -> pd.DataFrame:
    """`subset, alpha, by_hand, of_the_sweep`: cross-entropies of the change deltas of all layers."""
    tables = {
        name: pd.read_csv(sweep / f"report/{name}.csv", dtype={"layer": str}) for name in ("gaps", "exp2B_metrics")
    }
    gaps, doses = (table[table["target"] == "change"] for table in tables.values())
    doses = doses[(doses["condition"] == "alpha") & (doses["layer"] == widest_set(gaps))]
    rows = list(read_rows(sweep / "data/evaluation.jsonl"))
    names: dict[str, Any] = {}
    with named_as_on_the_page(sweep, models):
        exec(compile(blocks()[1], str(PAGE), "exec"), names)
    records = []
    for alpha, alpha_rows in doses.groupby("alpha"):
        if alphas is None or alpha in alphas:
            names["alpha"] = alpha
            for subset, expected in alpha_rows.set_index("subset")["mean_ce"].items():
                chosen = [row for row in rows if row.label == subset]
                by_hand = cross_entropy(names["model"], names["tokenizer"], chosen)
                records.append({"subset": subset, "alpha": alpha, "by_hand": by_hand, "of_the_sweep": expected})
    return pd.DataFrame(records)


def main(
    name: Annotated[str, typer.Argument(help="The sweep's name.")],
    root: Annotated[Path, typer.Option(help="The storage root.")] = Path("mlruns"),
    csv: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    table = compare(root / "sweeps" / name, root / "models")
    typer.echo(table.round(5).to_string(index=False))
    if csv is not None:
        table.round(5).to_csv(csv, index=False)
    apart = ((table["by_hand"] - table["of_the_sweep"]).abs() / table["of_the_sweep"]).max()
    typer.echo(f"at most {apart:.1e} apart, of the cross-entropy")
    if apart > ROUNDING:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
