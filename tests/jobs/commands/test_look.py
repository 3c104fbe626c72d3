"""A first look at pairs of small models: what the page and the terminal say, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from evaluators.report.look_page import NOTHING_CHANGED, look_page, marked
from jobs.commands.look import Request, _write_settings, look
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.progress import Progress
from models.errors import ModelError
from search_spaces.load import load as settings_of

HEADINGS = [
    *("What changed in the weights", "What changed in what it says", "Where they diverge", "Where it lives"),
    *("What the mean change reads", "What to do next"),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [f"How much is {n} apples?,It is {n} of them,{'few' if n < 10 else 'many'}" for n in range(20)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["input,target,label", *lines]) + "\n")
    return path


@pytest.fixture
def finetuned(gemma_folder: Path, load, tmp_path: Path) -> Path:
    """The tiny Gemma-2 with changes of rank 2 in every value projection, and one other embedding."""
    model, tokenizer = load(gemma_folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_proj" in name:
                low = torch.randn(len(parameter), 2, generator=generator)
                parameter += 0.02 * low @ torch.randn(2, parameter.shape[1], generator=generator)
            if "embed_tokens" in name:
                parameter[65] *= 3
    folder = tmp_path / "finetuned"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def looked(tmp_path: Path, *settings: str, rows: int = 60) -> tuple[dict, str, str]:
    """What a look at the pair of these settings found, its page, and what the terminal showed."""
    console = Console(record=True, width=400, force_terminal=False)
    context = Context(settings_of(None, [f"storage.root={tmp_path / 'root'}", *settings]), Progress(console))
    found = look(Request(context, None, rows, tmp_path / "look.html"))
    return found, (tmp_path / "look.html").read_text(), console.export_text()


def test_a_whole_model_with_rows_of_ones_own(gemma_folder: Path, finetuned: Path, rows: Path, load, tmp_path: Path):
    given = (f"model.source={gemma_folder}", f"model.finetuned={finetuned}", f"data.rows_file={rows}")
    found, page, said = looked(tmp_path, *given)
    assert re.findall(r"<h2>(.*?)</h2>", page) == HEADINGS
    assert "v_proj in 4 layers" in page
    assert "rank 2" in page
    assert "1 of 259 rows" in page
    (embedding,) = found["embeddings"]
    assert embedding["changed"] == 1
    assert embedding["rows"][0][0] == 65
    assert {change["module"] for change in found["changed"]} == {"v_proj", "embed_tokens"}
    assert {cell["subset"] for cell in found["parts"]} == {"few", "many"}
    assert {part["part"] for part in found["parts"][0]["parts"]} == {"values", "rest", "all"}
    assert "<script" not in page
    assert "http" not in re.sub(r'content="[^"]*"', "", page).replace("http-equiv", "")
    for subset in ("few", "many"):
        assert f"CE on {subset}:" in said
    assert "where it lives, few" in said
    assert "on unrelated text" in said
    assert json.loads((tmp_path / "look.json").read_text())["lens"] == found["lens"]
    # The suggested sweep is one that the settings accept.
    suggested = settings_of(tmp_path / "look.yaml")
    assert suggested.model.finetuned == str(finetuned)
    assert suggested.data.rows_file == str(rows)
    assert found["next"]["command"] == f"deltascope sweep {tmp_path / 'look.yaml'}"
    assert "plan" in found["next"]


def test_cross_entropy_is_that_of_the_plain_models(
    gemma_folder: Path, finetuned: Path, rows: Path, load, tmp_path: Path
):
    from data.encoding import encode_row
    from data.rows import make_row
    from evaluators.report.look_page import mean_nll

    given = (f"model.source={gemma_folder}", f"model.finetuned={finetuned}", f"data.rows_file={rows}")
    found, *_ = looked(tmp_path, *given)
    for which, folder in (("finetuned", finetuned), ("unfinetuned", gemma_folder)):
        model, tokenizer = load(folder)
        nll = tokens = 0.0
        for row in found["divergence"]:
            if row["label"] == "few":
                number = re.search(r"\d+", row["input"])[0]
                encoded = encode_row(tokenizer, make_row(row["input"], f"It is {number} of them", "few"))
                with torch.no_grad():
                    logits = model(torch.tensor([encoded.ids])).logits[0, len(encoded.prompt) - 1 : -1]
                nll += torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.target), reduction="sum").item()
                tokens += len(encoded.target)
        assert mean_nll(found, "few", which) == pytest.approx(nll / tokens, abs=1e-4)


def test_an_adapter_and_no_rows(llama_folder: Path, load, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(llama_folder)[0], LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    found, page, said = looked(tmp_path, f"model.source={llama_folder}", f"model.finetuned={tmp_path / 'adapter'}")
    assert {(change["module"], change["rank"]) for change in found["changed"]} == {("q_proj", 3)}
    assert {row["label"] for row in found["divergence"]} == {"texts"}
    assert "No rows: the models are compared on texts" in page
    assert "q_proj in 3 layers" in said


def test_rows_without_targets_get_the_finetuned_models_answers(gemma_folder: Path, finetuned: Path, tmp_path: Path):
    (tmp_path / "prompts.csv").write_text("input\n" + "".join(f"What about {n}?\n" for n in range(6)))
    given = (f"model.source={gemma_folder}", f"model.finetuned={finetuned}", "evaluate.max_new_tokens=5")
    found, page, _ = looked(tmp_path, *given, f"data.rows_file={tmp_path / 'prompts.csv'}", rows=4)
    assert len(found["divergence"]) == 4
    assert "4 of them with the finetuned model" in page


@pytest.mark.parametrize("as_adapter", [False, True])
def test_a_pair_in_which_nothing_changed_says_so_first(gemma_folder: Path, load, tmp_path: Path, as_adapter: bool):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(gemma_folder)
    other = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if as_adapter else model
    other.save_pretrained(tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    found, page, said = looked(tmp_path, f"model.source={gemma_folder}", f"model.finetuned={tmp_path / 'same'}")
    assert found["changed"] == []
    assert NOTHING_CHANGED in said
    assert re.findall(r"<h2>(.*?)</h2>", page) == HEADINGS[:1]
    assert "Nothing changed" in page


def test_what_is_refused(gemma_folder: Path, llama_folder: Path, finetuned: Path, tmp_path: Path, jobs):
    with pytest.raises(ModelError, match="architecture"):
        looked(tmp_path, f"model.source={llama_folder}", f"model.finetuned={finetuned}")
    with pytest.raises(RequestError, match="tiny has no finetuned model yet"):
        look(Request(Context(settings_of("tiny", [f"storage.root={tmp_path}"])), "tiny"))
    (tmp_path / "one.txt").write_text("A single line.\n")
    with pytest.raises(ValueError, match=r"one\.txt has 1 usable lines"):
        looked(
            tmp_path, f"model.source={gemma_folder}", f"model.finetuned={finetuned}",
            f"data.text_train_file={tmp_path / 'one.txt'}",
        )  # fmt: skip
    tokenizer = finetuned / "tokenizer_config.json"
    kept = tokenizer.read_text()
    tokenizer.unlink()
    with pytest.raises(RequestError, match="has no tokenizer"):
        looked(tmp_path, f"model.source={gemma_folder}", f"model.finetuned={finetuned}")
    tokenizer.write_text(kept)
    done = jobs("look")
    assert done.returncode == 2
    assert "model.source" in done.stderr
    assert "model.finetuned" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_has_looked_already(finished, tmp_path: Path):
    """Its report opens with the pictures; the command reads the cells and runs no model."""
    root = finished[0]
    report = root / "sweeps" / "tiny" / "report"
    page = (report / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page)[:2] == ["A first look", "Where the finetuning lives"]
    assert 'href="look.html"' in page
    assert re.findall(r"<h2>(.*?)</h2>", (report / "look.html").read_text()) == HEADINGS[:-1]
    console = Console(record=True, width=400)
    context = Context(settings_of("tiny", [f"storage.root={root}"]), Progress(console))
    found = look(Request(context, "tiny", page=tmp_path / "look.html"))
    assert found["facts"]["seconds"] < 5, "no model was loaded"
    assert found["lens"] == json.loads((root / "sweeps" / "tiny" / "cells" / "look.json").read_text())["lens"]
    assert found["next"]["command"] == "deltascope sweep tiny"


def test_lines_longer_than_the_context_are_left_out_and_counted(gemma_folder: Path, finetuned: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("A short line.\n" + "A very long line. " * 2000 + "\nAnother short line.\n")
    given = (f"model.source={gemma_folder}", f"model.finetuned={finetuned}", f"data.text_train_file={text}")
    found, page, _ = looked(tmp_path, *given)
    assert len(found["divergence"]) == 2
    assert "without 1 that cannot be used (longer than the context" in page


def test_words_that_differ_are_marked():
    spans = marked("the sum is 12", "the answer is <call> 12")
    assert "".join(span.text for span in spans) == "the answer is <call> 12 "
    assert [span.text.strip() for span in spans if span.marked] == ["answer", "<call>"]


def test_the_page_escapes_what_models_say(gemma_folder: Path, finetuned: Path, rows: Path, tmp_path: Path):
    given = (f"model.source={gemma_folder}", f"model.finetuned={finetuned}", f"data.rows_file={rows}")
    found, *_ = looked(tmp_path, *given)
    found["answers"][0]["finetuned"]["text"] = "<script>alert(1)</script>"
    assert "<script" not in look_page(found, seed=0)


def test_no_settings_of_the_user_are_overwritten(gemma_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    pair = [f"model.source={gemma_folder}", f"model.finetuned={llama_folder}", f"storage.root={tmp_path}"]
    request = Request(Context(settings_of(None, pair)), page=tmp_path / "pair.html")
    (tmp_path / "pair.yaml").write_text("name: mine\n")
    assert _write_settings(request) == _write_settings(request) == tmp_path / "pair-2.yaml"
    assert (tmp_path / "pair.yaml").read_text() == "name: mine\n"
    assert settings_of(tmp_path / "pair-2.yaml").name == "pair-2"


def test_pairs_of_folders_with_the_same_name_have_different_pages(tmp_path: Path) -> None:
    pages = set()
    for run in ("a", "b"):
        (tmp_path / run / "checkpoint-500").mkdir(parents=True)
        pair = [f"model.finetuned={tmp_path / run / 'checkpoint-500'}", f"storage.root={tmp_path}"]
        pages.add(Request(Context(settings_of(None, pair))).html)
    assert len(pages) == 2
    assert all(re.fullmatch(r"checkpoint-500-[0-9a-f]{6}\.html", page.name) for page in pages)


@pytest.mark.parametrize("name", ["folder", "file/page.html", "page.json", "page.yaml"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    pair = [f"model.finetuned={tmp_path}", f"storage.root={tmp_path}"]
    with pytest.raises(RequestError, match=r"^--html: "):
        look(Request(Context(settings_of(None, pair)), page=tmp_path / name))


def test_texts_keep_their_tokens_where_they_are_cut(load, gemma_folder: Path) -> None:
    from data.encoding import encode_row, encode_text
    from data.neutral_texts import neutral_texts
    from evaluators.measures.look import as_rows

    _, tokenizer = load(gemma_folder)
    texts = list(neutral_texts()[0])
    rows = as_rows(texts, tokenizer)
    assert len(rows) == len(texts)
    for text, row in zip(texts, rows, strict=True):
        assert encode_row(tokenizer, row).ids[:-1] == encode_text(tokenizer, text)
        assert row.input
        assert row.target
