"""``dynamo-kvtc bench gpu``: the GPU codec by stage, against floors measured on the same device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from dynamo_kvtc.cli.output import JsonFlag, make_table, print_json, print_line, print_note, print_table
from dynamo_kvtc.evaluation.gpu.plot import plot_roofline
from dynamo_kvtc.evaluation.gpu.prediction import predict
from dynamo_kvtc.evaluation.gpu.rates import data_sheet
from dynamo_kvtc.evaluation.gpu.shapes import find_shapes
from dynamo_kvtc.evaluation.gpu.tables import markdown, tables

__all__ = ["command"]


def command(
    shapes: Annotated[
        str | None, typer.Option(help="Beginnings of shapes' names, such as mistral,qwen; by default all.")
    ] = None,
    profiles: Annotated[str, typer.Option(help="rd, kvtc, or both.")] = "rd,kvtc",
    prediction: Annotated[
        str | None,
        typer.Option(
            "--predict",
            metavar="DEVICE",
            help="Measure nothing: predict from the data sheet of H100 or H200.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence.", min=16)] = 8192,
    tier_block_tokens: Annotated[int, typer.Option(help="Tokens per stream.", min=16)] = 256,
    block_size: Annotated[int, typer.Option(help="Tokens of an engine's block.", min=1)] = 16,
    repetitions: Annotated[int, typer.Option(help="Runs of each measurement.", min=1, max=1000)] = 5,
    sm_share: Annotated[
        float, typer.Option(help="Share of the SMs that the codec may take.", min=0.01, max=1)
    ] = 1.0,
    layers_per_group: Annotated[
        int | None, typer.Option(help="Layers with one basis; by default calibration's.", min=1)
    ] = None,
    entropy: Annotated[str, typer.Option(help="What chunks are coded with: deflate or rans.")] = "deflate",
    disk: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; the temporary folder by default.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the roofline to this PNG.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print tables as Markdown.")] = False,
    json: JsonFlag = False,
) -> None:
    """Measure the GPU codec by stage, against floors measured on the same device."""
    chosen, wanted = find_shapes(shapes), tuple(dict.fromkeys(profiles.split(",")))
    if not set(wanted) <= {"rd", "kvtc"}:
        raise typer.BadParameter(f"{profiles!r} is not rd, kvtc or both", param_hint="--profiles")
    if entropy not in ("deflate", "rans"):
        raise typer.BadParameter(f"{entropy!r} is neither deflate nor rans", param_hint="--entropy")
    if prediction is not None:
        report = predict(chosen, wanted, data_sheet(prediction), tokens, entropy)
    else:
        # Needs Triton, which a prediction does not.
        from dynamo_kvtc.evaluation.gpu.measure import GpuBenchSettings, bench_gpu

        settings = GpuBenchSettings(
            wanted, tokens, tier_block_tokens, block_size, repetitions, sm_share, layers_per_group, disk,
            entropy,
        )  # fmt: skip
        report = asyncio.run(bench_gpu(chosen, settings, note=print_note))
    if plot is not None:
        plot_roofline(report, plot)
    if json:
        print_json(report.to_dict())
    elif as_markdown:
        print_line(markdown(tables(report)))
    else:
        for table in tables(report):
            print_table(make_table(table.title, table.columns, table.rows))
