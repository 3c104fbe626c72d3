"""What commands read from a sweep's folder is of the pair that the settings name."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.commands.load import DeltaChoice, combination, load_deltas
from jobs.commands.look import look_of_sweep
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.files import write_json
from search_spaces.load import load
from sites import Site


def test_what_was_made_for_another_pair_is_not_used(tmp_path: Path, gemma_folder: Path, llama_folder: Path) -> None:
    pair = [f"model.source={gemma_folder}", f"model.finetuned={llama_folder}"]
    context = Context(load("tiny", [f"storage.root={tmp_path}", *pair]))
    context.space.cells.mkdir(parents=True)
    write_json(context.space.cells / "look.json", {"kind": "look"})
    write_json(context.space.cells / "parts_tool.json", {"kind": "parts"})
    assert look_of_sweep(context) is None
    chosen = combination(context, DeltaChoice("change", d_new=4))
    with pytest.raises(RequestError, match=f"has not yet read {llama_folder} as it is now; run `lora` first"):
        load_deltas(context, [Site(1)], chosen)
