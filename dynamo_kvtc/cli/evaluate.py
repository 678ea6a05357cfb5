"""``dynamo-kvtc evaluate``: ratio and quality of an artifact on held-out text."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.calibration.models import load_model
from dynamo_kvtc.cli.output import make_table, print_json, print_note, print_table, progress
from dynamo_kvtc.cli.parsing import parse_ratios
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation import PROFILES, EvaluationProtocol, EvaluationReport, evaluate
from dynamo_kvtc.evaluation.plot import plot_ratio_against_kl

__all__ = ["command"]

_COLUMNS = (
    "profile",
    "nominal",
    "ratio",
    "total",
    "KL",
    "top-1",
    "NLL",
    "NLL change",
    "key error",
    "value error",
    "encode tok/s",
    "decode tok/s",
)


def command(
    model: Annotated[str, typer.Option(help="Hugging Face folder, .gguf file or builtin:smollm2.")],
    artifact: Annotated[Path, typer.Option(help="Folder that `calibrate` wrote.")],
    text: Annotated[
        list[Path],
        typer.Option(help="Held-out UTF-8 text: one file or more.", exists=True, dir_okay=False),
    ],
    more_text: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Further files of --text.", exists=True, dir_okay=False),
    ] = None,
    ratios: Annotated[
        str | None, typer.Option(help="Ratios such as 10,20; by default all of the artifact's plans.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="raw: the cache's own bytes; by default the artifact's profile.")
    ] = None,
    documents: Annotated[int, typer.Option(help="Documents, cut evenly from the files.", min=1)] = 8,
    tier_block_tokens: Annotated[int, typer.Option(help="Tokens per stream.", min=16)] = 256,
    dtype: Annotated[
        str, typer.Option(help="dtype of model and cache; the artifact must have been calibrated in it.")
    ] = "bfloat16",
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="OUT", help="Write the report as JSON; - is standard output.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write ratio against KL as a PNG.")] = None,
) -> None:
    """Measure ratio and quality of an artifact on held-out text, with real streams."""
    if profile is not None and profile not in PROFILES:
        raise typer.BadParameter(f"{profile!r} is not one of {', '.join(PROFILES)}", param_hint="--profile")
    chosen = None if ratios is None else parse_ratios(ratios)
    if threads is not None:
        torch.set_num_threads(threads)
    protocol = EvaluationProtocol(documents=documents, tier_block_tokens=tier_block_tokens)
    parameters = load_artifact(artifact)
    loaded = load_model(model, dtype)
    with progress() as bar:
        task = bar.add_task("evaluating", total=None)
        report = evaluate(
            loaded,
            parameters,
            [*text, *(more_text or ())],
            chosen,
            profile=profile,
            protocol=protocol,
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if plot is not None:
        plot_ratio_against_kl([report], plot)
    if json == "-":
        print_json(report.to_dict())
        return
    if json is not None:
        _write_json(report, Path(json))
    _print(report)


def _write_json(report: EvaluationReport, path: Path) -> None:
    try:
        path.write_text(json_module.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise EvaluationError(f"cannot write the report {path}: {error}; choose another place") from error


def _print(report: EvaluationReport) -> None:
    protocol = report.protocol
    title = (
        f"{report.architecture} in {report.dtype}: {protocol.documents} documents, positions "
        f"{protocol.sink_tokens} to {protocol.coded_stop - 1} of {protocol.context_tokens} replaced, "
        f"{protocol.scored_tokens} tokens scored behind"
    )
    rows = [
        (
            row.profile,
            f"{row.nominal_ratio:g}",
            f"{row.ratio:.1f}x",
            f"{row.ratio_total:.2f}x",
            f"{row.kl:.4f} ({row.kl_low:.4f} to {row.kl_high:.4f})",
            f"{row.top1:.1%}",
            f"{row.nll:.3f}",
            f"{row.nll_delta:+.4f}",
            f"{row.key_error:.1%}",
            f"{row.value_error:.1%}",
            f"{row.encode_tokens_per_s:,.0f}",
            f"{row.decode_tokens_per_s:,.0f}",
        )
        for row in report.rows
    ]
    print_table(make_table(title, _COLUMNS, rows))
    print_note(
        "ratio: the stored tokens, sinks included, over all bytes of their streams; total: the whole context "
        "over everything it occupies, with a 16-bit recent window; in brackets: 95 % interval over documents"
    )
