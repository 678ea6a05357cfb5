"""doctor: real probes once, and what it says about machines that are not this one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dynamo_kvtc.cli import doctor, probes
from dynamo_kvtc.cli.app import app

runner = CliRunner()

HEALTHY: dict[str, dict[str, Any]] = {
    "torch": {"version": "2.13.0", "threads": 8, "bfloat16": "AMX", "cuda_build": None, "gpu": None},
    "nixl": {"ucx": True, "posix": True, "file_mode": "io_uring"},
    "nvcomp": {"error": "ModuleNotFoundError: No module named 'nvidia'"},
}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the probes report; they are replaced, since other machines cannot be had here."""
    reports = {name: dict(report) for name, report in HEALTHY.items()}
    monkeypatch.setattr(doctor, "run_probe", lambda name, timeout_s: reports[name])
    return reports


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of installed packages; NIXL's are replaced."""
    versions = {"nixl-cu13": "1.5.1"}
    real = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: versions.get(name) if name.startswith("ni") else real(name)
    )
    return versions


def check(name: str) -> doctor.Check:
    return next(check for check in doctor.examine(1.0) if check.name == name)


def test_this_machine_is_examined_for_real() -> None:
    shown = runner.invoke(app, ["doctor", "--json"])
    report = json.loads(shown.stdout)
    assert shown.exit_code == (0 if report["healthy"] else 1)
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["torch"]["status"] == "ok"
    assert by_name["NIXL UCX"]["status"] == by_name["NIXL POSIX"]["status"] == "ok"
    assert by_name["GPUDirect Storage"]["status"] in ("absent", "ok")
    assert "transfer.gds" in by_name["GPUDirect Storage"]["advice"]


def test_a_healthy_machine_exits_with_0(found: dict[str, Any], wheels: dict[str, str]) -> None:
    shown = runner.invoke(app, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "usable" in shown.stdout
    assert "'dynamo-kvtc[nvcomp]'" in shown.stdout


@pytest.mark.parametrize(
    ("probe", "report", "name"),
    [
        ("torch", {"error": "did not end within 1 s"}, "torch"),
        ("nixl", {"error": "TransferError: NIXL's UCX backend cannot start"}, "NIXL UCX and POSIX"),
        ("nixl", {"ucx": True, "posix": False, "file_mode": "aio"}, "NIXL POSIX"),
    ],
)
def test_what_the_core_needs_fails_the_examination(
    found: dict[str, Any], wheels: dict[str, str], probe: str, report: dict[str, Any], name: str
) -> None:
    found[probe] = report
    shown = runner.invoke(app, ["doctor"])
    assert shown.exit_code == 1
    assert f"not usable: {name}" in shown.stdout
    assert check(name).advice


@pytest.mark.parametrize(
    ("installed", "status", "advice"),
    [
        ({"nixl-cu13": "1.5.0"}, "ok", ""),
        ({"nixl-cu12": "1.10.2"}, "ok", ""),
        ({"nixl-cu13": "1.4.9"}, "warning", "short reads"),
        ({"nixl-cu13": "1.3.2rc1"}, "warning", "short reads"),
        ({"nixl-cu13": "1.5.1", "nixl-cu12": "1.5.1"}, "warning", "one process"),
        ({}, "failed", "pip install --no-deps nixl-cu13"),
    ],
)
def test_nixl_versions(
    found: dict[str, Any], wheels: dict[str, str], installed: dict[str, str], status: str, advice: str
) -> None:
    wheels.clear()
    wheels.update(installed)
    assert check("NIXL").status == status
    assert advice in check("NIXL").advice


def test_optional_parts_are_only_advised(found: dict[str, Any], wheels: dict[str, str]) -> None:
    found["torch"].update(bfloat16=None, cuda_build="13.0")
    found["nixl"]["file_mode"] = "aio"
    assert check("bfloat16 on the CPU").status == "absent"
    assert check("CUDA").status == "warning" and "driver" in check("CUDA").advice
    assert check("io_uring").status == "warning" and "seccomp" in check("io_uring").advice
    assert runner.invoke(app, ["doctor"]).exit_code == 0


def test_a_gpu_machine(found: dict[str, Any], wheels: dict[str, str]) -> None:
    found["torch"].update(cuda_build="13.0", gpu="NVIDIA H200")
    found["nvcomp"] = {"version": "6.0.0", "gpu": True}
    assert check("CUDA").status == check("nvCOMP").status == "ok"


def test_a_probe_that_hangs_or_crashes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # The child process is replaced: no library here hangs or crashes on demand.
    def ends_late(*args: object, timeout: float, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("probe", timeout)

    monkeypatch.setattr(subprocess, "run", ends_late)
    assert probes.run_probe("nixl", 2.0) == {"error": "did not end within 2 s"}

    crashed = subprocess.CompletedProcess([], -11, stdout="noise\n", stderr="a\nSegmentation fault\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: crashed)
    assert probes.run_probe("nixl", 2.0) == {"error": "ended with code -11: Segmentation fault"}


def test_a_probe_that_raises_is_an_error() -> None:
    assert "KeyError" in probes.run_probe("no such probe", 60.0)["error"]


def test_a_configurations_keys_and_folders_are_looked_at(
    found: dict[str, Any], wheels: dict[str, str], tmp_path: Path
) -> None:
    names = ("private", "readable", "writable", "absent")
    for name, mode in zip(names, (0o600, 0o644, 0o660), strict=False):
        (tmp_path / name).write_bytes(name.encode().ljust(32, b"."))
        (tmp_path / name).chmod(mode)
    (tmp_path / "tier").mkdir(mode=0o755)
    path = tmp_path / "config.yaml"
    keys = ", ".join(f"{{id: {name}, file: {name}}}" for name in names)
    path.write_text(
        "codec: {profile: raw}\n"
        f"tiers: [{{kind: disk, path: tier, capacity: 1GiB, encryption: {{keys: [{keys}]}}}}]\n"
    )
    shown = runner.invoke(app, ["doctor", "--json", "--config", str(path)])
    assert shown.exit_code == 1
    status = {check["name"]: check["status"] for check in json.loads(shown.stdout)["checks"]}
    assert [status[f"key {name}"] for name in names] == ["ok", "warning", "failed", "failed"]
    assert status["tier folder"] == "warning"
    path.write_text("tiers: 7\n")
    shown = runner.invoke(app, ["doctor", "--json", "--config", str(path)])
    assert shown.exit_code == 1 and "validate-config" in shown.stdout
