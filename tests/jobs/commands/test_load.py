"""What commands read from a sweep's folder is of the pair that the settings name."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.commands.load import DeltaChoice, combination, load_deltas
from jobs.commands.look import look_of_sweep
from jobs.context import keys
from jobs.context.context import Context
from jobs.context.workspace import FINETUNED, PAIR
from jobs.errors import RequestError
from jobs.files import keyed_folder, write_json
from search_spaces.load import load
from sites import MLP, QKV, Site


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


def test_what_an_earlier_lora_changed_says_nothing_about_the_next(tmp_path: Path) -> None:
    def context_for(targets: str) -> Context:
        return Context(load("tiny", [f"storage.root={tmp_path}", f"lora.space.targets={targets}"]))

    first = context_for("q_proj,v_proj")
    keyed_folder(first.space.lora, keys.lora_group(first.settings))
    write_json(first.space.folder / FINETUNED, {"key": "adapter"})
    pair = {"key": "adapter", "exact": True, "rest": [], "rounded": "", "linear": ["qkv", "o"], "notes": []}
    write_json(first.space.folder / PAIR, {**pair, "sites": [Site(1, QKV).key]})
    assert first.sites_of("change") == [Site(1, QKV)]
    assert {site.kind for site in context_for("gate_proj,up_proj,down_proj").sites_of("change")} == {MLP}
