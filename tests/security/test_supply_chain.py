"""The image's lock, the list of licences and pyproject.toml speak of the same packages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info < (3, 11):
    pytest.skip("needs tomllib, of Python 3.11", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "k8s" / "requirements.lock").read_text()
WANTED = (ROOT / "k8s" / "requirements.in").read_text()
#: Extras whose packages are never part of what is shipped.
TOOLS = {"test", "docs", "fuzz"}
#: Extras that the image has on top of the core.
IN_IMAGE = ("object", "encryption")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match[0].lower().replace("_", "-")


def names(requirements: list[str]) -> set[str]:
    return {name_of(requirement) for requirement in requirements}


def pins() -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK, re.MULTILINE))


def added() -> set[str]:
    return {name_of(line) for line in WANTED.splitlines() if line and not line.startswith("#")}


def test_the_lock_covers_what_the_package_needs_and_the_runtime_lacks() -> None:
    provided = set(re.search(r"# provided: (.*)", WANTED)[1].split())  # type: ignore[index]
    assert not provided & added()
    assert provided | added() >= names(project()["dependencies"])
    extras = project()["optional-dependencies"]
    for extra in IN_IMAGE:
        assert names(extras.get(extra, [])) <= added(), extra
    assert added() <= set(pins())


def test_every_pin_has_hashes_and_names_no_index() -> None:
    entries = [entry for entry in re.split(r"\n(?=[a-z])", LOCK) if entry.strip()]
    assert len(entries) == len(pins())
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "http" not in LOCK and "file:" not in LOCK


def test_the_image_installs_from_the_lock() -> None:
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text()
    assert "--require-hashes -r /tmp/wheels/requirements.lock" in dockerfile
    assert "nvcomp" not in LOCK.lower() + dockerfile.lower()


def test_the_licence_of_every_dependency_is_listed() -> None:
    text = (ROOT / "docs" / "licences.md").read_text()
    listed = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in row.split(", ")}
    wanted = names(project()["dependencies"]) | set(pins())
    for extra, requirements in project()["optional-dependencies"].items():
        if extra not in TOOLS:
            wanted |= names(requirements)
    assert {f"`{name}`" for name in wanted} <= listed
