"""``dynamo-kvtc demo``: the whole way of a KV block on a small real model."""

from __future__ import annotations

import asyncio
import json as json_module
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, LoadedModel, load_model
from dynamo_kvtc.calibration.run import Progress, calibrate
from dynamo_kvtc.calibration.settings import CalibrationSettings
from dynamo_kvtc.cli.output import JsonFlag, print_json, print_note, print_table, progress
from dynamo_kvtc.data import CALIBRATION_TEXTS, HELDOUT_TEXTS
from dynamo_kvtc.demo.measure import DemoReport
from dynamo_kvtc.demo.plots import write_plots
from dynamo_kvtc.demo.run import DemoSettings, measure_serving
from dynamo_kvtc.demo.tables import report_table
from dynamo_kvtc.evaluation import EvaluationProtocol, EvaluationReport, evaluate

__all__ = ["command"]


def command(
    out: Annotated[Path, typer.Option(help="Folder for artifact, tiers, report and plots.")] = Path(
        "demo-output"
    ),
    ratio: Annotated[float, typer.Option(help="Nominal ratio to serve with: 8, 16 or 32.")] = 16.0,
    short: Annotated[bool, typer.Option(help="Less text, one document length: one or two minutes.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run the whole way on a small real model and show what it saves."""
    if ratio not in (8.0, 16.0, 32.0):
        raise typer.BadParameter(f"{ratio:g} is not one of 8, 16, 32", param_hint="--ratio")
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    artifact, seconds = _calibrate(out, short)
    print_note("loading the model")
    loaded = load_model(BUILTIN_SMOLLM2)
    settings = DemoSettings(ratio=ratio)
    if short:
        settings = DemoSettings(ratio=ratio, document_tokens=(1024, 2048), repeats=1, answer_tokens=24)
    serving = asyncio.run(measure_serving(loaded, artifact, settings, out, print_note))
    quality = _evaluate(loaded, artifact, documents=2 if short else 8)
    report = DemoReport(
        model="SmolLM2-135M-Instruct",
        profile="kvtc",
        nominal_ratio=ratio,
        artifact_id=artifact.parameters.artifact_id.hex(),
        calibration_s=seconds,
        quality=quality,
        serving=serving,
    )
    path = out / "report.json"
    path.write_text(json_module.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plots = write_plots(report, out)
    if json:
        print_json(report.to_dict())
    else:
        print_table(report_table(report))
    print_note(f"written: {', '.join(str(file) for file in (path, *plots))}")


def _calibrate(out: Path, short: bool) -> tuple[Artifact, float]:
    """Make the artifact, or take the one that an earlier run made with the same settings."""
    settings = CalibrationSettings(
        model=BUILTIN_SMOLLM2,
        texts=CALIBRATION_TEXTS,
        out=out / ("artifact-short" if short else "artifact"),
        profile="kvtc",
        tokens=8_192 if short else 40_960,
    )
    start = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("calibrating", total=None)

        def show(step: Progress) -> None:
            bar.update(task, description=step.stage, completed=step.done, total=step.total)

        artifact = calibrate(settings, show)
    return artifact, time.perf_counter() - start


def _evaluate(loaded: LoadedModel, artifact: Artifact, documents: int) -> EvaluationReport:
    with progress() as bar:
        task = bar.add_task("quality on held-out text", total=None)
        return evaluate(
            loaded,
            artifact,
            HELDOUT_TEXTS,
            protocol=EvaluationProtocol(documents=documents),
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
        )
