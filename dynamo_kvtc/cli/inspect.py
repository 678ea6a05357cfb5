"""``dynamo-kvtc inspect``: what an artifact, a stored object or a disk tier's folder holds, and whether it
is sound. Reads only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, load_artifact
from dynamo_kvtc.calibration.report import summarise
from dynamo_kvtc.cli.output import JsonFlag, format_bytes, make_table, print_json, print_line, print_table
from dynamo_kvtc.codec.bitstream import SectionKind, StreamHeader, parse_header, read_section
from dynamo_kvtc.errors import KvtcError, TierError
from dynamo_kvtc.tiers.disk_files import LOCK_NAME
from dynamo_kvtc.tiers.disk_format import (
    StoredObject,
    scan_segment,
    segment_files,
    stored_objects,
    tier_folders,
)

__all__ = ["Report", "command", "inspect_path"]

#: Damage lines that are printed; the count is complete.
_MAX_DAMAGE_LINES = 20


@dataclass
class Report:
    """What was found at a path.

    Attributes
    ----------
    kind : str
        ``"artifact"``, ``"object"`` or ``"disk tier"``.
    facts : dict[str, Any]
        About the whole; sizes are in keys that end in ``_bytes``.
    parts : list[dict[str, Any]]
        About its parts, all with the same keys.
    damage : list[str]
        One line for each thing that failed a check; empty if all is sound.
    """

    kind: str
    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)


def command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Artifact folder, stored object or disk tier folder.", metavar="PATH...", exists=True
        ),
    ],
    json: JsonFlag = False,
) -> None:
    """Show and verify artifacts, stored objects and disk tier folders.

    Every checksum is verified and every chunk inflated; nothing is changed. Exits with 1 if anything is
    damaged. A folder that a running process uses can be inspected.
    """
    reports = [inspect_path(path) for path in paths]
    if json:
        print_json([{**asdict(report), "sound": not report.damage} for report in reports])
    else:
        for report in reports:
            _print_report(report)
    if any(report.damage for report in reports):
        raise typer.Exit(1)


def inspect_path(path: Path) -> Report:
    """Find out what lies at `path` and verify it.

    Raises
    ------
    TierError
        If it is nothing that dynamo_kvtc writes, or cannot be read.
    """
    try:
        if path.is_file():
            return _inspect_object(path)
        if (path / MANIFEST_NAME).exists():
            return _inspect_artifact(path)
        if any(segment_files(part) or (part / LOCK_NAME).exists() for part in tier_folders(path)):
            return _inspect_disk_tier(path)
    except OSError as error:
        raise TierError(
            f"cannot read {error.filename or path}: {error.strerror}; check its rights"
        ) from error
    raise TierError(
        f"{path} holds neither an artifact ({MANIFEST_NAME}) nor segments of a disk tier; "
        "name such a folder, or a file with one stored object"
    )


def _inspect_artifact(folder: Path) -> Report:
    report = Report("artifact", str(folder))
    try:
        artifact = load_artifact(folder)
    except KvtcError as error:
        report.damage.append(str(error))
        return report
    manifest = artifact.manifest
    groups = manifest.groups
    report.facts = {
        "id": manifest.id,
        "profile": manifest.profile,
        "written_by": manifest.tool_version,
        **manifest.model.model_dump(exclude={"rope", "weights_hash"}),
        "weights_hash": manifest.model.weights_hash,
        "calibration_rows": manifest.calibration.rows,
        "layer_groups": len(groups),
        "key_components": sum(group.keys.rank for group in groups),
        "value_components": sum(group.values.rank for group in groups),
        "parameters_bytes": manifest.parameters.size,
    }
    for ratio in summarise(artifact)["ratios"]:
        components: Counter[str] = Counter()
        for plan in ratio["plans"]:
            components.update(plan["components"])
        report.parts.append(
            {
                "ratio": ratio["ratio"],
                "plan_id": ratio["plan_id"],
                "bits_per_token": ratio["bits_per_token"],
                **({"step": ratio["plans"][0]["step"]} if manifest.profile == "rd" else {}),
                **components,
                "key_error": ratio["key_error"],
                "value_error": ratio["value_error"],
                **{f"measured_{name}": value for name, value in (ratio["measured"] or {}).items()},
            }
        )
    return report


def _inspect_object(path: Path) -> Report:
    report = Report("object", str(path))
    header, report.damage = _check_stream(path.read_bytes())
    if header is None:
        return report
    geometry = header.geometry
    raw_bytes = header.num_tokens * geometry.token_bytes
    report.facts = {
        "profile": header.profile.name.lower(),
        "version": header.version,
        "artifact_id": header.artifact_id.hex(),
        "plan_id": header.plan_id,
        "num_layers": geometry.num_layers,
        "num_kv_heads": geometry.num_kv_heads,
        "head_size": geometry.head_size,
        "dtype": geometry.dtype,
        "first_position": header.first_position,
        "num_tokens": header.num_tokens,
        "sink_tokens": header.sink_tokens,
        "sink_bits": header.sink_bits,
        "binding": header.binding.hex(),
        "raw_bytes": raw_bytes,
        "stored_bytes": header.stream_size,
        "ratio": raw_bytes / header.stream_size,
    }
    for group, layers in enumerate(header.layer_groups):
        for kind in SectionKind:
            if chunks := header.chunks_of(group, kind):
                report.parts.append(
                    {
                        "layers": f"{layers.first} to {layers.stop - 1}",
                        "section": kind.name.lower(),
                        "chunks": len(chunks),
                        "stored_bytes": sum(chunk.stored_size for chunk in chunks),
                        "plain_bytes": sum(chunk.plain_size for chunk in chunks),
                    }
                )
    return report


def _check_stream(data: bytes) -> tuple[StreamHeader | None, list[str]]:
    """Return a stream's header, if it is sound, and all that is wrong with the stream."""
    try:
        header = parse_header(data)
    except KvtcError as error:
        return None, [str(error)]
    damage = []
    if len(data) != header.stream_size:
        damage.append(f"it has {len(data)} bytes, its header says {header.stream_size}")
    for group in range(len(header.layer_groups)):
        start, stop = header.group_span(group)
        for kind in SectionKind:
            try:
                read_section(header, group, kind, memoryview(data)[start:stop])
            except KvtcError as error:
                damage.append(f"layer group {group}, {kind.name.lower()}: {error}")
    return header, damage


@dataclass
class _Share:
    """Objects of one profile, artifact and plan."""

    objects: int = 0
    tokens: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0


def _inspect_disk_tier(folder: Path) -> Report:
    report = Report("disk tier", str(folder))
    shares: dict[tuple[str, str, int], _Share] = {}
    objects = stored_bytes = 0
    for found in stored_objects(folder):
        if not isinstance(found, StoredObject):
            report.damage.append(f"{found.name}: a damaged header; what lies behind it is skipped")
            continue
        objects += 1
        stored_bytes += found.record.nbytes
        header, problems = _check_record(found)
        if header is not None:
            key = (header.profile.name.lower(), header.artifact_id.hex(), header.plan_id)
            share = shares.setdefault(key, _Share())
            share.objects += 1
            share.tokens += header.num_tokens
            share.raw_bytes += header.num_tokens * header.geometry.token_bytes
            share.stored_bytes += found.record.nbytes
        if problems and _is_still_there(found):
            place = f"{found.path.name}, byte {found.record.offset}"
            report.damage += [f"{place}: {problem}" for problem in problems]
    paths = [path for part in tier_folders(folder) for _, path in segment_files(part)]
    report.facts = {
        "segments": len(paths),
        "objects": objects,
        "stored_bytes": stored_bytes,
        "disk_bytes": sum(path.stat().st_blocks * 512 for path in paths),
    }
    report.parts = [
        {
            "profile": profile,
            "artifact_id": artifact_id,
            "plan_id": plan_id,
            **asdict(share),
            "ratio": share.raw_bytes / share.stored_bytes,
        }
        for (profile, artifact_id, plan_id), share in sorted(shares.items())
    ]
    return report


def _check_record(found: StoredObject) -> tuple[StreamHeader | None, list[str]]:
    """Check an object of a tier as `_check_stream` does, and that it is the object of its key."""
    if not found.intact:
        return None, ["the object does not match its checksum"]
    with found.path.open("rb") as file:
        file.seek(found.record.offset)
        header, problems = _check_stream(file.read(found.record.nbytes))
    if header is not None and header.binding != found.record.key:
        problems.append("the stream belongs to another key")
    return header, problems


def _is_still_there(found: StoredObject) -> bool:
    """Tell damage from an eviction by the tier's owner while it was being read."""
    try:
        with found.path.open("rb") as file:
            scan = scan_segment(file.fileno())
    except FileNotFoundError:
        return False
    return scan is not None and found.record in scan.records


def _print_report(report: Report) -> None:
    facts = [(_words(name), _shown(name, value)) for name, value in report.facts.items()]
    print_table(make_table(f"{report.kind} {report.path}", ("", "value"), facts))
    if report.parts:
        names = list(report.parts[0])
        rows: Sequence[Sequence[str]] = [
            [_shown(name, value) for name, value in part.items()] for part in report.parts
        ]
        print_table(make_table("parts", [_words(name) for name in names], rows))
    for line in report.damage[:_MAX_DAMAGE_LINES]:
        print_line(f"damaged: {line}")
    if len(report.damage) > _MAX_DAMAGE_LINES:
        print_line(f"… and {len(report.damage) - _MAX_DAMAGE_LINES} more")
    print_line("every check passed" if not report.damage else f"checks failed: {len(report.damage)}")


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _shown(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
