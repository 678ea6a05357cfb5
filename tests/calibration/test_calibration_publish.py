"""A store of artifacts: whole or not at all, side by side, named by aliases."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from random_rd import write_random_rd_artifact
from typer.testing import CliRunner

from dynamo_kvtc.calibration import publish as module
from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, PARAMETERS_NAME, load_artifact
from dynamo_kvtc.calibration.publish import publish, resolve
from dynamo_kvtc.cli.app import app
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.errors import ArtifactError

runner = CliRunner()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make(tmp_path / "one", seed=1)


def make(folder: Path, seed: int) -> Path:
    write_random_rd_artifact(folder, geometry=KvGeometry(2, 2, 8), groups=[LayerRange(0, 2)], seed=seed)
    return folder


def test_an_artifact_is_published_under_its_id_and_aliases(artifact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    target = publish(artifact, store, ["inputs-1", "latest"])
    assert target == store / load_artifact(artifact).manifest.id
    assert load_artifact(target).manifest == load_artifact(artifact).manifest
    for name in ("inputs-1", "latest", target.name):
        assert resolve(store, name) == target
    assert sorted(path.name for path in store.iterdir()) == sorted([target.name, "aliases"])


def test_a_second_time_changes_nothing(artifact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    target = publish(artifact, store, ["a"])
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert publish(artifact, store, ["a", "b"]) == target
    assert before == {path: path.stat().st_mtime_ns for path in target.iterdir()}


def test_artifacts_live_side_by_side_and_an_alias_moves(artifact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = publish(artifact, store, ["latest"])
    second = publish(make(tmp_path / "two", seed=2), store, ["latest"])
    assert first != second
    assert resolve(store, "latest") == second
    assert load_artifact(resolve(store, first.name)).folder == first


@pytest.mark.parametrize("name", [MANIFEST_NAME, PARAMETERS_NAME])
def test_a_damaged_artifact_is_not_published(artifact: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((artifact / name).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / name).write_bytes(data)
    with pytest.raises(ArtifactError):
        publish(artifact, tmp_path / "store", ["latest"])
    assert not (tmp_path / "store").exists()


def test_damage_in_the_store_is_found_and_the_alias_stays(artifact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    target = publish(artifact, store)
    (target / PARAMETERS_NAME).write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        publish(artifact, store, ["latest"])
    with pytest.raises(ArtifactError, match="no artifact 'latest'"):
        resolve(store, "latest")


def test_a_failed_copy_leaves_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    store = tmp_path / "store"
    monkeypatch.setattr(module.shutil, "copyfile", fail)
    with pytest.raises(ArtifactError, match=r"No space left.*check its rights and its space"):
        publish(artifact, store, ["latest"])
    assert list(store.iterdir()) == []


def test_publishers_at_the_same_time_agree(artifact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    start = threading.Barrier(4)
    targets: list[Path] = []

    def run() -> None:
        start.wait()
        targets.append(publish(artifact, store, ["latest"]))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(targets) == 4 and set(targets) == {resolve(store, "latest")}
    assert sorted(path.name for path in store.iterdir()) == sorted([targets[0].name, "aliases"])


@pytest.mark.parametrize("alias", ["", "../x", ".hidden", "a/b", "g" * 64, "ab" * 32, "a b"])
def test_bad_aliases_are_refused(artifact: Path, tmp_path: Path, alias: str) -> None:
    with pytest.raises(ArtifactError, match="is no alias"):
        publish(artifact, tmp_path / "store", [alias])
    if alias != "ab" * 32:
        with pytest.raises(ArtifactError, match="is no alias"):
            resolve(tmp_path, alias)


def test_what_is_not_in_the_store_is_named(artifact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    publish(artifact, store)
    (store / "aliases" / "bad").write_text("../../etc")
    for name, said in (("ab" * 32, "has no artifact"), ("new", "publish one"), ("bad", "names no id")):
        with pytest.raises(ArtifactError, match=said):
            resolve(store, name)


def test_the_command_publishes(artifact: Path, tmp_path: Path) -> None:
    arguments = ["publish", str(artifact), str(tmp_path / "store"), "--alias", "latest", "--json"]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert Path(report["folder"]) == resolve(tmp_path / "store", "latest")
    assert report["id"] == load_artifact(artifact).manifest.id
