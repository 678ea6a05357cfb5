"""``dynamo-kvtc bench``: encode, decode, transfers and lookups on this machine; ``bench gpu``: a GPU's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import torch
import typer

from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.cli import bench_gpu
from dynamo_kvtc.cli.output import (
    JsonFlag,
    format_bytes,
    format_rate,
    format_seconds,
    make_table,
    print_json,
    print_note,
    print_table,
)
from dynamo_kvtc.cli.parsing import parse_ratios
from dynamo_kvtc.evaluation.bench import BenchReport, BenchSettings, run_bench
from dynamo_kvtc.evaluation.codec_speed import EntropyCoding

__all__ = ["group"]

group = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
group.command("gpu")(bench_gpu.command)


@group.callback(invoke_without_command=True)
def command(
    context: typer.Context,
    artifact: Annotated[Path | None, typer.Option(help="Folder that `calibrate` wrote.")] = None,
    ratios: Annotated[
        str | None, typer.Option(help="Ratios such as 10,20; by default all of the artifact's plans.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that are encoded and decoded at a time.", min=1)] = 1024,
    tier_block_tokens: Annotated[int, typer.Option(help="Tokens per stream.", min=16)] = 256,
    repetitions: Annotated[int, typer.Option(help="Runs of each measurement.", min=1, max=1000)] = 5,
    disk: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; the temporary folder by default.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Measure encode, decode, transfers and lookups on this machine; `bench gpu` measures the GPU codec."""
    if context.invoked_subcommand is not None:
        return
    if artifact is None:
        raise typer.BadParameter("give the artifact to measure", param_hint="--artifact")
    chosen = None if ratios is None else parse_ratios(ratios)
    if threads is not None:
        torch.set_num_threads(threads)
    settings = BenchSettings(
        tier_blocks=-(-tokens // tier_block_tokens),
        tier_block_tokens=tier_block_tokens,
        repetitions=repetitions,
        disk=disk,
    )
    report = asyncio.run(run_bench(load_artifact(artifact), chosen, settings, note=print_note))
    if json:
        print_json(report.to_dict())
        return
    _print_codecs(report)
    _print_tiers(report)


def _print_codecs(report: BenchReport) -> None:
    environment = report.environment
    where = (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['torch_threads']} torch threads"
    )
    rows = []
    for bench in report.codecs:
        speed = bench.speed
        rows.append(
            (
                f"{bench.nominal_ratio:g}",
                f"{speed.ratio:.1f}x",
                f"{speed.encode_tokens_per_s:,.0f}",
                f"{speed.decode_tokens_per_s:,.0f}",
                *_entropy_cells(bench.entropy),
            )
        )
    columns = (
        "nominal",
        "ratio",
        "encode tok/s",
        "decode tok/s",
        "entropy coding",
        "against order-0 entropy",
    )
    print_table(make_table(f"Codec on {where}", columns, rows))
    for name, direction in (("encode", "encode_shares"), ("decode", "decode_shares")):
        shares = [getattr(bench.speed, direction) for bench in report.codecs]
        stages = [(stage, *(f"{share[stage]:.0%}" for share in shares)) for stage in shares[0]]
        heads = [f"{bench.nominal_ratio:g}" for bench in report.codecs]
        print_table(make_table(f"Share of {name} by stage, one thread", ("stage", *heads), stages))


def _entropy_cells(entropy: EntropyCoding) -> tuple[str, str]:
    if not entropy.stored_bytes or not entropy.entropy_bytes:
        return "-", "-"  # no chunk became smaller, so all are stored as they are
    return (
        f"{entropy.plain_bytes / entropy.stored_bytes:.2f}x",
        f"{entropy.stored_bytes / entropy.entropy_bytes - 1:+.1%}",
    )


def _print_tiers(report: BenchReport) -> None:
    rows = [
        (
            tier.name,
            f"{tier.objects} x {format_bytes(tier.object_bytes)}",
            format_rate(tier.write_bytes_per_s),
            format_rate(tier.read_bytes_per_s),
            f"{format_seconds(tier.lookup_s)} for {tier.prefix_keys:,} keys",
        )
        for tier in report.tiers
    ]
    columns = ("tier", "objects", "write", "read (disk: page cache)", "lookup")
    print_table(make_table("Tiers", columns, rows))
