"""What the documentation names exists: files, headings, make targets, metrics, commands and options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from dynamo_kvtc.cli.app import app
from dynamo_kvtc.observability import METRICS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """Return a page without its fenced code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what links may name on a page: its headings, as GitHub writes them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|\$ |^    )make ([a-z0-9-]+)", text, re.MULTILINE)) <= targets
    metrics = {metric.name for metric in METRICS}
    named = re.findall(r"dynamo_kvtc_[a-z_]+(?=[`{\[ ])", text)
    assert {re.sub("_(sum|count|bucket)$", "", name) for name in named} <= metrics


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    lines = page.read_text().replace("\\\n", " ").splitlines()
    for line in lines:
        found = re.match(r"(?:\$ |    )?dynamo-kvtc (.*)", line)
        if found is None:
            continue
        words = shlex.split(found[1], comments=True)
        command = typer.main.get_command(app)
        while words and hasattr(command, "resolve_command"):
            context = command.make_context("dynamo-kvtc", [], resilient_parsing=True)
            name = words[0]
            if name not in command.list_commands(context):
                break
            _, command, words = command.resolve_command(context, words)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line
