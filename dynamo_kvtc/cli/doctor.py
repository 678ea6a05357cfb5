"""``dynamo-kvtc doctor``: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dynamo_kvtc.cli.key_files import exposed_key_files, key_files
from dynamo_kvtc.cli.output import JsonFlag, format_bytes, print_json, print_line, print_table
from dynamo_kvtc.cli.probes import PROBES, run_probe
from dynamo_kvtc.config import DiskTierConfig, check_config
from dynamo_kvtc.errors import ConfigError, TierError
from dynamo_kvtc.tiers.access import check_private
from dynamo_kvtc.tiers.encryption_keys import read_key
from dynamo_kvtc.transfer.gds import gds_problem

__all__ = ["Check", "command", "examine"]

#: ``ok``; ``warning``: works, but read the advice; ``absent``: optional and not here; ``failed``: the
#: core needs it.
Status = Literal["ok", "warning", "absent", "failed"]

_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "absent": "dim", "failed": "bold red"}

#: Before this version NIXL reports short reads as done.
_NIXL_SOUND = (1, 5, 0)

_SMALL_SHM_BYTES = 1024**3
_SMALL_MEMLOCK_BYTES = 1024**3


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: what was found, and what to do about it."""

    name: str
    status: Status
    found: str
    advice: str = ""


def command(
    timeout: Annotated[
        float, typer.Option(help="Seconds that each probe (torch, NIXL, nvCOMP) may take.", min=1, max=600)
    ] = 60.0,
    config: Annotated[
        Path | None,
        typer.Option(help="A configuration whose encryption keys and disk folders are looked at, too."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check what works on this machine and say what to do about the rest.

    Transfers a few bytes through NIXL's UCX and POSIX backends. Exits with 1 if something that the core
    needs does not work.
    """
    checks = [*examine(timeout), *(() if config is None else _configured(config))]
    healthy = all(check.status != "failed" for check in checks)
    if json:
        print_json({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        _print_checks(checks)
    if not healthy:
        raise typer.Exit(1)


def examine(timeout_s: float) -> list[Check]:
    """Run every check; each probe may take `timeout_s` seconds."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        running = {name: pool.submit(run_probe, name, timeout_s) for name in PROBES}
        found = {name: future.result() for name, future in running.items()}
    return [
        _python(),
        *_libraries(),
        *_torch(found["torch"]),
        *_nixl(found["nixl"]),
        _nvcomp(found["nvcomp"]),
        _gds(),
        _shared_memory(),
        _memlock(),
    ]


def _configured(path: Path) -> Iterator[Check]:
    """Look at what a configuration names on this machine: is it there, and private?"""
    config, problems = check_config(path)
    if config is None:
        advice = f"dynamo-kvtc validate-config {path}"
        yield Check("configuration", "failed", "; ".join(map(str, problems[:3])), advice)
        return
    exposed = {one.path: one for one in exposed_key_files(config)}
    for file, name in key_files(config).items():
        if file in exposed:
            status: Status = "failed" if exposed[file].refused else "warning"
            yield Check(f"key {name}", status, exposed[file].problem, exposed[file].advice)
            continue
        try:
            read_key(name, file)
        except ConfigError as error:
            yield Check(f"key {name}", "failed", str(error), "a worker does not start without its keys")
        else:
            yield Check(f"key {name}", "ok", f"{file}, private")
    for tier in config.tiers:
        if isinstance(tier, DiskTierConfig):
            try:
                check_private(tier.path, "refuse")
            except TierError as error:
                refused = config.security.open_folders == "refuse"
                allowed = config.security.open_folders == "allow"
                found: Status = "failed" if refused else "ok" if allowed else "warning"
                yield Check("tier folder", found, str(error), "")
            else:
                there = "private" if tier.path.exists() else "not there yet; it is made private"
                yield Check("tier folder", "ok", f"{tier.path}, {there}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check(
        "Python", "ok" if supported else "warning", found, "" if supported else "tested: 3.10 to 3.13"
    )


def _libraries() -> Iterator[Check]:
    for package, use in (
        ("isal", "DEFLATE"),
        ("xxhash", "checksums"),
        ("safetensors", "artifacts"),
    ):
        found = _version(package)
        if found is None:
            yield Check(package, "failed", "not installed", f"{use}: pip install {package}")
        else:
            yield Check(package, "ok", f"{found}, {use}")


def _torch(found: Mapping[str, Any]) -> Iterator[Check]:
    if "error" in found:
        yield Check("torch", "failed", found["error"], "install a build for this machine: pip install torch")
        return
    yield Check("torch", "ok", f"{found['version']}, {found['threads']} threads")
    if found["bfloat16"]:
        yield Check("bfloat16 on the CPU", "ok", f"{found['bfloat16']}: projections run in bfloat16")
    else:
        missing = "neither AMX nor AVX512-BF16: projections run in float32"
        yield Check("bfloat16 on the CPU", "absent", missing, "slower, not worse")
    if found["gpu"]:
        yield Check("CUDA", "ok", f"{found['gpu']}, CUDA {found['cuda_build']}")
    elif found["cuda_build"]:
        yield Check(
            "CUDA", "warning", "torch is built for CUDA but sees no GPU", "check nvidia-smi and the driver"
        )
    else:
        yield Check(
            "CUDA", "absent", "torch is built for the CPU", "nothing to do on a machine without a GPU"
        )


def _nixl(found: Mapping[str, Any]) -> Iterator[Check]:
    wheels = {name: _version(name) for name in ("nixl-cu13", "nixl-cu12")}
    installed = {name: known for name, known in wheels.items() if known}
    if not installed:
        advice = "pip install --no-deps nixl-cu13 (nixl-cu12 for CUDA 12)"
        yield Check("NIXL", "failed", "not installed", advice)
        return
    text = ", ".join(f"{name} {known}" for name, known in installed.items())
    if len(installed) > 1:
        advice = "uninstall one: they cannot be in one process"
        yield Check("NIXL", "warning", text, advice)
    elif any(_numbers(known) < _NIXL_SOUND for known in installed.values()):
        advice = "1.5.0 and later report short reads as errors; checksums catch them here, but upgrade"
        yield Check("NIXL", "warning", text, advice)
    else:
        yield Check("NIXL", "ok", text)
    if "error" in found:
        advice = "no tier can work without both; the message says which backend failed"
        yield Check("NIXL UCX and POSIX", "failed", found["error"], advice)
        return
    for backend, what in (("ucx", "memory to memory"), ("posix", "memory to file")):
        sound = bool(found[backend])
        yield Check(
            f"NIXL {backend.upper()}",
            "ok" if sound else "failed",
            f"{what}, tried with a real transfer" if sound else f"{what}: the bytes arrived changed",
            "" if sound else "do not serve from this machine; reinstall NIXL",
        )
    if found["file_mode"] == "io_uring":
        yield Check("io_uring", "ok", "files are read and written with io_uring")
    else:
        advice = "allow it in the kernel (kernel.io_uring_disabled) and in the container's seccomp profile"
        yield Check("io_uring", "warning", f"not usable; files use {found['file_mode']}", advice)


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``1.5.0rc1`` gives ``(1, 5, 0)``."""
    return tuple(int(digits) for digits in re.findall(r"\d+", text)[:3])


def _nvcomp(found: Mapping[str, Any]) -> Check:
    if "error" not in found:
        if found["gpu"]:
            return Check("nvCOMP", "ok", found["version"])
        return Check(
            "nvCOMP",
            "absent",
            f"{found['version']}, but no GPU",
            "its licence allows use with NVIDIA GPUs only",
        )
    if any(_version(f"nvidia-nvcomp-cu{major}") for major in (12, 13)):
        return Check("nvCOMP", "warning", found["error"], "reinstall it, or uninstall it: it is optional")
    return Check("nvCOMP", "absent", "not installed", "on a GPU machine: pip install 'dynamo-kvtc[nvcomp]'")


def _gds() -> Check:
    problem = gds_problem()
    if problem is not None:
        return Check("GPUDirect Storage", "absent", problem, "optional; leave transfer.gds at false")
    found = "driver and cuFile are here; not tried"
    return Check("GPUDirect Storage", "ok", found, "transfer.gds: true uses it for files")


def _shared_memory() -> Check:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Check("/dev/shm", "warning", str(error.strerror), "engines in several processes need it")
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if usage.free < _SMALL_SHM_BYTES:
        return Check(
            "/dev/shm", "warning", found, "raise it (pods: sharedMemorySize) before an engine needs it"
        )
    return Check("/dev/shm", "ok", found)


def _memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", "ok", "unlimited")
    found = f"limit {format_bytes(soft)}"
    if soft < _SMALL_MEMLOCK_BYTES:
        advice = "RDMA registers memory by locking it: ulimit -l unlimited; not needed without RDMA"
        return Check("locked memory", "warning", found, advice)
    return Check("locked memory", "ok", found)


def _print_checks(checks: list[Check]) -> None:
    table = Table("check", "status", "found", "what to do")
    for check in checks:
        style = _STYLES[check.status]
        table.add_row(check.name, Text(check.status, style), escape(check.found), escape(check.advice))
    print_table(table)
    failed = [check.name for check in checks if check.status == "failed"]
    print_line(f"not usable: {', '.join(failed)}" if failed else f"usable, with {os.cpu_count()} cores")
