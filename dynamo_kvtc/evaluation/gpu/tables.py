"""Measurements and predictions as tables, for terminals and for `docs/gpu.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamo_kvtc.evaluation.gpu.report import PUBLISHED, GpuReport, ShapeReport, Stage

__all__ = ["Table", "markdown", "tables"]


@dataclass(frozen=True, slots=True)
class Table:
    """A title, names of columns, and rows of cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: GpuReport) -> list[Table]:
    """Return the rates, then for each profile what all shapes take by stage, and what that comes to."""
    rates = report.rates
    made = [
        Table(
            f"Rates ({rates.source})",
            ("device", "bf16 products", "memory, read and written", "to the device", "to the host"),
            (
                (
                    rates.device,
                    f"{rates.matrix / 1e12:,.0f} TFLOP/s",
                    f"{rates.memory / 1e9:,.0f} GB/s",
                    f"{rates.to_device / 1e9:,.0f} GB/s",
                    f"{rates.to_host / 1e9:,.0f} GB/s",
                ),
            ),
        )
    ]
    for profile in dict.fromkeys(shape.profile for shape in report.shapes):
        shapes = [shape for shape in report.shapes if shape.profile == profile]
        made += [_stages(report, profile, shapes), _totals(report, profile, shapes)]
    return made


def markdown(made: Sequence[Table]) -> str:
    """Return tables as Markdown."""
    parts = []
    for table in made:
        lines = [f"**{table.title}**", "", _line(table.columns), "|" + "---|" * len(table.columns)]
        parts.append("\n".join([*lines, *(_line(row) for row in table.rows)]))
    return "\n\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _verb(report: GpuReport) -> str:
    return "measured" if report.rates.source == "measured" else "predicted"


def _coder(shapes: Sequence[ShapeReport]) -> str:
    return ", rANS" if shapes[0].coder == "rANS" else ""


def _stages(report: GpuReport, profile: str, shapes: Sequence[ShapeReport]) -> Table:
    measured = report.rates.source == "measured"
    rows = []
    for direction in ("encode", "decode"):
        of_shapes = [getattr(shape, direction) for shape in shapes]
        for index, stage in enumerate(of_shapes[0].stages):
            cells = [
                _stage_cell(way.stages[index], shape.tokens, measured)
                for way, shape in zip(of_shapes, shapes, strict=True)
            ]
            rows.append((f"{direction}: {stage.name}", *cells))
    share = ", share of it reached" if measured else ""
    title = f"{report.rates.device}, {profile}{_coder(shapes)}, {_verb(report)}: ns a token (floor{share})"
    return Table(title, ("stage", *(shape.shape for shape in shapes)), tuple(rows))


def _stage_cell(stage: Stage, tokens: int, measured: bool) -> str:
    if stage.seconds is None:
        return "-"
    cell = f"{stage.seconds / tokens * 1e9:,.0f}"
    if stage.floor_s is None:
        return cell
    # What a prediction reaches is what it assumes.
    reached = f", {stage.of_floor:.0%}" if measured and stage.of_floor is not None else ""
    return f"{cell} ({stage.floor_s / tokens * 1e9:,.0f}{reached})"


def _totals(report: GpuReport, profile: str, shapes: Sequence[ShapeReport]) -> Table:
    def row(name: str, *cells: str) -> tuple[str, ...]:
        return (name, *cells)

    published = {
        way: f" (published, H100, NeMo-12B: {PUBLISHED[f'{way}_raw_bytes_per_s'] / 1e9:.0f})"
        for way in ("encode", "decode")
    }
    tokens = shapes[0].tokens
    rows = [
        row("ratio of streams", *(f"{s.ratio:.1f}x" for s in shapes)),
        row(
            "layers of the first group, of the largest; groups",
            *(f"{s.first_group}, {s.largest_group}; {s.layer_groups}" for s in shapes),
        ),
        row("components stored, of the row", *(f"{s.stored / s.row:.1%}" for s in shapes)),
        row("bases on the device", *(f"{s.basis_bytes / 1e6:,.0f} MB" for s in shapes)),
        row(
            "staging on the device, a token", *(f"{s.staging_bytes_per_token / 1e3:,.0f} kB" for s in shapes)
        ),
    ]
    rows.append(row("entropy coder", *(s.coder for s in shapes)))
    for way in ("encode", "decode"):
        ways = [getattr(s, way) for s in shapes]
        rows += [
            row(
                f"{way} on the device, GB/s of raw KV{published[way]}",
                *(f"{w.device_raw_bytes_per_s / 1e9:,.0f}" for w in ways),
            ),
            row(f"{way} with copies, GB/s", *(f"{w.raw_bytes_per_s / 1e9:,.0f}" for w in ways)),
            row(f"{way} with copies, tokens/s", *(f"{w.tokens_per_s:,.0f}" for w in ways)),
            row(f"{way}: longest stage", *(w.longest for w in ways)),
        ]
    for index, onboard in enumerate(shapes[0].onboard):
        where = f"{tokens:,} tokens from {'pinned host memory' if onboard.source == 'host' else 'disk'}"
        ones = [s.onboard[index] for s in shapes]
        rows += [
            row(f"{where}, ms", *(f"{one.seconds * 1e3:,.1f}" for one in ones)),
            row("of it until the first layer group", *(f"{one.first_group_share:.0%}" for one in ones)),
            row("of it until the first layer", *(f"{one.first_layer_s / one.seconds:.0%}" for one in ones)),
        ]
    rows += [
        row("instead: raw copy at the link's rate, ms", *_ms(s.alternatives.raw_copy_s for s in shapes)),
        row("instead: prefill at the matrix rate, ms", *_ms(s.alternatives.recompute_s for s in shapes)),
    ]
    title = f"{report.rates.device}, {profile}{_coder(shapes)}, {_verb(report)}"
    return Table(title, ("", *(shape.shape for shape in shapes)), tuple(rows))


def _ms(seconds: Iterable[float]) -> list[str]:
    return [f"{s * 1e3:,.1f}" for s in seconds]
