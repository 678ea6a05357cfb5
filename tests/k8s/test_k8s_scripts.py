"""The chart's shell scripts, run by a real shell with the real commands, on a real (random) artifact."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from random_rd import write_random_rd_artifact
from tiny_model import write_tiny_model

from dynamo_kvtc.calibration.publish import publish
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange

ROOT = Path(__file__).parents[2]
FILES = ROOT / "k8s" / "chart" / "files"
CONFIG = "artifact: {link}\ntiers:\n- kind: host\n  capacity: 1GiB\n"


def run(script: str, *arguments: str, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script with this interpreter as python3."""
    folder = Path(str(environment.pop("bin")))
    folder.mkdir(exist_ok=True)
    python = folder / "python3"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(FILES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
            **{name: str(value) for name, value in environment.items()},
        },
    )


def artifact(folder: Path, seed: int = 1) -> Path:
    write_random_rd_artifact(folder, geometry=KvGeometry(2, 2, 8), groups=[LayerRange(0, 2)], seed=seed)
    return folder


@pytest.mark.parametrize("script", sorted(path.name for path in FILES.glob("*.sh")))
def test_scripts_are_plain_shell(script: str) -> None:
    for shell in {"sh", "dash", "bash"}:
        if found := shutil.which(shell):
            checked = subprocess.run([found, "-n", str(FILES / script)], capture_output=True, check=False)
            assert checked.returncode == 0, checked.stderr


def test_prepare_pins_the_artifact_for_the_pods_life(tmp_path: Path) -> None:
    link, config = tmp_path / "run" / "artifact", tmp_path / "kvtc.yaml"
    link.parent.mkdir()
    config.write_text(CONFIG.format(link=link))
    store = tmp_path / "store"
    first = publish(artifact(tmp_path / "one"), store, ["inputs"])
    settings = {"bin": tmp_path / "bin", "LINK": link, "CONFIG": config, "STORE": store, "WAIT_SECONDS": "0"}
    done = run("prepare.sh", **settings, ARTIFACT_ALIAS="inputs")
    assert done.returncode == 0, done.stderr
    assert link.resolve() == first.resolve() and f"artifact {first.name}" in done.stdout
    # Another artifact takes the alias; a container that starts again in the same pod keeps the first.
    second = publish(artifact(tmp_path / "two", seed=2), store, ["inputs"])
    assert run("prepare.sh", **settings, ARTIFACT_ALIAS="inputs").returncode == 0
    assert link.resolve() == first.resolve()
    link.unlink()  # a new pod
    assert run("prepare.sh", **settings, ARTIFACT_ALIAS="inputs").returncode == 0
    assert link.resolve() == second.resolve()
    link.unlink()
    assert run("prepare.sh", **settings, ARTIFACT_ID=first.name).returncode == 0
    assert link.resolve() == first.resolve()


@pytest.mark.parametrize("name", [{"ARTIFACT_ALIAS": "inputs"}, {"ARTIFACT_ID": "ab" * 32}])
def test_prepare_gives_up_at_its_deadline_and_says_why(tmp_path: Path, name: dict[str, str]) -> None:
    (tmp_path / "store").mkdir()
    settings = {"bin": tmp_path / "bin", "LINK": tmp_path / "link", "CONFIG": tmp_path / "absent.yaml"}
    done = run("prepare.sh", **settings, STORE=tmp_path / "store", WAIT_SECONDS="0", **name)
    assert done.returncode == 1
    assert "look at the calibration Job" in done.stderr and next(iter(name.values())) in done.stderr


def test_prepare_refuses_a_wrong_configuration(tmp_path: Path) -> None:
    config = tmp_path / "kvtc.yaml"
    config.write_text("codec: {profile: raw}\ntiers:\n- kind: host\n  capcity: 1GiB\n")
    done = run("prepare.sh", bin=tmp_path / "bin", CONFIG=config, LINK=tmp_path / "link")
    assert done.returncode == 1
    assert "did you mean capacity?" in done.stdout


def test_install_puts_a_wheel_where_python_finds_it_once(tmp_path: Path) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    make_wheel(wheels)
    settings = {
        "bin": tmp_path / "bin",
        "TARGET": target,
        "WHEELS": wheels,
        "PACKAGES": "kvtc-test-wheel==1.0",
    }
    done = run("install.sh", **settings)
    assert done.returncode == 0, done.stderr
    assert (target / "kvtc_test_wheel.py").read_text() == "VALUE = 1\n"
    (target / "kvtc_test_wheel.py").unlink()
    assert run("install.sh", **settings).returncode == 0
    assert not (target / "kvtc_test_wheel.py").exists()  # a second start installs nothing
    missing = run("install.sh", **{**settings, "TARGET": tmp_path / "other", "PACKAGES": "kvtc-absent"})
    assert missing.returncode != 0
    assert not (tmp_path / "other" / ".installed").exists()


def make_wheel(folder: Path) -> None:
    """Write a minimal wheel by hand: no build tool, no index."""
    import zipfile

    info = "kvtc_test_wheel-1.0.dist-info"
    with zipfile.ZipFile(folder / "kvtc_test_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("kvtc_test_wheel.py", "VALUE = 1\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvtc-test-wheel\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_calibrate_makes_an_artifact_once(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_tiny_model(model)
    texts = (tmp_path / "first.txt", tmp_path / "second.txt")
    for text in texts:
        text.write_text("".join(f"{text.stem} {i}: the quick brown fox\n" for i in range(400)))
    store = tmp_path / "store"
    settings: dict[str, str | Path] = {
        "bin": tmp_path / "bin",
        "STORE": store,
        "SCRATCH": store / ".calibration",
        "ARTIFACT_ALIAS": "inputs",
        "MODEL": model,
        "TEXTS": "\n".join(map(str, texts)),
    }
    flags = ["--profile", "kvtc", "--tokens", "2048", "--document-tokens", "256", "--ratios", "4"]
    flags += ["--layers-per-group", "2", "--dtype", "float32", "--seed", "1"]
    done = run("calibrate.sh", *flags, **settings)
    assert done.returncode == 0, done.stderr
    made = (store / "aliases" / "inputs").read_text()
    assert (store / "aliases" / "latest").read_text() == made
    assert (store / made.strip() / "artifact.json").is_file()
    again = run("calibrate.sh", *flags, **settings)
    assert again.returncode == 0 and "in the store already" in again.stdout, again.stderr
