"""README, SETUP, CONTRIBUTING and docs/: every link leads somewhere, every command line and setting in them exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from jobs.cli import app
from search_spaces.load import load, presets
from search_spaces.schema import Sweep
from tests.end_to_end.conftest import REPOSITORY

PAGES = [REPOSITORY / name for name in ("README.md", "SETUP.md", "CONTRIBUTING.md", "mlruns/README.md")]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
COMMAND = re.compile(r"(?:python -m jobs|(?<![\w./-])(?:\.venv/bin/)?deltascope) ([a-z].*?)(?=\s*(?:[`\n]|#|$))")
"""A line of a code block, or what stands between backquotes; a word in running text has no command after it."""
SETTING = re.compile(r"`(" + "|".join(Sweep.model_fields) + r")\.([a-z][a-z0-9_.]*)")
GROUP: Any = typer.main.get_command(app)


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(REPOSITORY)) for path in paths]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(page: Path) -> Iterator[str]:
    """Lines of code blocks, a line that goes on in the next one as one line, and what stands between backquotes."""
    text = page.read_text().replace("\\\n", " ")
    for block in FENCED.findall(text):
        yield from block.splitlines()[1:-1]
    rest = FENCED.sub("", text)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    yield from (" ".join(one.split()) for one in re.findall(r"`([^`]+)`", rest))


def commands(page: Path) -> list[str]:
    """The arguments of every command line, without those that only stand for one."""
    found = [match[1] for line in code(page) for match in COMMAND.finditer(line)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert there.is_relative_to(REPOSITORY), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_command_line_is_understood(page: Path) -> None:
    """The command and its options exist; where it names a preset or a file, so do the settings after it."""
    for line in commands(page):
        name, *arguments = shlex.split(line)
        assert name in GROUP.commands, line
        context = GROUP.commands[name].make_context(name, arguments)
        config = context.params.get("config")
        if config in presets() or str(config).endswith(".yaml"):
            load(config if config in presets() else REPOSITORY / config, context.params["overrides"] or [])


def test_command_lines_are_found() -> None:
    """So that the test above can fail."""
    found = {line.split()[0] for page in PAGES for line in commands(page)}
    assert {"sweep", "plan", "doctor", "track", "ui"} <= found
    with pytest.raises(Exception, match="No such option"):
        GROUP.commands["sweep"].make_context("sweep", ["tiny", "--nothing"])


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_setting_exists(page: Path) -> None:
    for section, rest in SETTING.findall(page.read_text()):
        model: Any = Sweep.model_fields[section].annotation
        for name in rest.rstrip(".").split("."):
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                break  # a mapping with names of the user's own
            assert name in model.model_fields, f"{section}.{rest}"
            model = model.model_fields[name].annotation


def test_the_readme_lists_every_command() -> None:
    table = re.findall(r"^\| (`.*?`) \|", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    listed = {words.split()[0] for cell in table for words in re.findall(r"`([a-z][^`]*)`", cell)}
    assert set(GROUP.commands) <= listed


def test_pages_are_short() -> None:
    """About two screens, and four pages for the study; tables that are written by a command are not counted."""
    texts = {path.name: re.sub(r"<!-- table.*?<!-- end -->", "", path.read_text(), flags=re.DOTALL) for path in PAGES}
    long = {name: len(text.splitlines()) for name, text in texts.items()}
    assert {
        name: lines for name, lines in long.items() if lines > {"study.md": 200, "python.md": 170}.get(name, 140)
    } == {}
