"""``dynamo-kvtc demo``: the whole way of a KV block on a small real model."""

from __future__ import annotations

import asyncio
import json as json_module
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, LoadedModel, load_model
from dynamo_kvtc.calibration.run import Progress, calibrate
from dynamo_kvtc.calibration.settings import DEFAULT_RATIOS, CalibrationSettings
from dynamo_kvtc.cli.output import JsonFlag, print_json, print_note, print_table, progress
from dynamo_kvtc.config import CodecConfig
from dynamo_kvtc.data import CALIBRATION_TEXTS, HELDOUT_TEXTS
from dynamo_kvtc.demo.measure import DemoReport
from dynamo_kvtc.demo.plots import write_plots
from dynamo_kvtc.demo.run import DemoSettings, measure_serving
from dynamo_kvtc.demo.tables import quality_table, serving_table
from dynamo_kvtc.evaluation import EvaluationProtocol, EvaluationReport, evaluate

__all__ = ["calibration_settings", "command"]


def command(
    out: Annotated[Path, typer.Option(help="Folder for artifact, tiers, report and plots.")] = Path(
        "demo-output"
    ),
    profile: Annotated[
        str, typer.Option(help="Profile to serve with: rd or kvtc; both are compared.")
    ] = "rd",
    ratio: Annotated[
        float | None,
        typer.Option(help="Ratio to serve with: 10, 20, 40 or 80 with rd, 8, 16 or 32 with kvtc."),
    ] = None,
    short: Annotated[bool, typer.Option(help="Less text, shorter documents: one or two minutes.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run the whole way on a small real model and show what it saves."""
    ratio = _checked_ratio(profile, ratio)
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    artifacts, seconds = {}, {}
    for name in DEFAULT_RATIOS:
        start = time.perf_counter()
        artifacts[name] = _calibrate(out, name, short)
        seconds[name] = time.perf_counter() - start
    print_note("loading the model")
    loaded = load_model(BUILTIN_SMOLLM2)
    settings = DemoSettings(ratio=ratio)
    if short:
        settings = DemoSettings(ratio=ratio, document_tokens=(1024, 2048), repeats=1, answer_tokens=24)
    serving = asyncio.run(measure_serving(loaded, artifacts[profile], settings, out, print_note))
    documents = 2 if short else 6
    report = DemoReport(
        model="SmolLM2-135M-Instruct",
        token_bytes=loaded.geometry.token_bytes_16bit,
        profile=profile,
        nominal_ratio=ratio,
        artifact_id=artifacts[profile].parameters.artifact_id.hex(),
        calibration_s=seconds,
        quality={name: _evaluate(loaded, artifact, documents) for name, artifact in artifacts.items()},
        serving=serving,
    )
    path = out / "report.json"
    path.write_text(json_module.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plots = write_plots(report, out)
    if json:
        print_json(report.to_dict())
    else:
        print_table(serving_table(report))
        print_table(quality_table(report))
    print_note(f"written: {', '.join(str(file) for file in (path, *plots))}")


def _checked_ratio(profile: str, ratio: float | None) -> float:
    if profile not in DEFAULT_RATIOS:
        raise typer.BadParameter(
            f"{profile!r} is not one of {', '.join(DEFAULT_RATIOS)}", param_hint="--profile"
        )
    if ratio is None:
        ratio = CodecConfig.model_validate({"profile": profile}).plan_ratio
    if ratio not in DEFAULT_RATIOS[profile]:
        known = ", ".join(f"{one:g}" for one in DEFAULT_RATIOS[profile])
        raise typer.BadParameter(f"{ratio:g} is not one of {known}", param_hint="--ratio")
    return ratio


def calibration_settings(out: Path, profile: str, short: bool) -> CalibrationSettings:
    """Return how the demo calibrates a profile, into which folder below `out`."""
    name = "artifact" if profile == "rd" else f"artifact-{profile}"
    settings = CalibrationSettings(
        model=BUILTIN_SMOLLM2,
        texts=CALIBRATION_TEXTS,
        out=out / (f"{name}-short" if short else name),
        profile=profile,
        tokens=20_480,
        # Three groups, so that the transfer of one can overlap the decoding of another, and seconds to fit
        # each. More layers a group, as calibrate takes for rd, store less at the same quality.
        layers_per_group=10,
        sensitivity_documents=6,
        validation_documents=1,
        recall_share=0.0,  # few documents, and all that the demo measures is text
    )
    if short:
        settings = replace(
            settings,
            tokens=8_192,
            document_tokens=1024,
            sample_tokens=512,
            sensitivity_documents=4,
            scored_tokens=192,
        )
    return settings


def _calibrate(out: Path, profile: str, short: bool) -> Artifact:
    """Make an artifact, or take the one that an earlier run made with the same settings."""
    settings = calibration_settings(out, profile, short)
    with progress() as bar:
        task = bar.add_task("calibrating", total=None)

        def show(step: Progress) -> None:
            stage = f"{profile}: {step.stage}"
            bar.update(task, description=stage, completed=step.done, total=step.total)

        return calibrate(settings, show)


def _evaluate(loaded: LoadedModel, artifact: Artifact, documents: int) -> EvaluationReport:
    with progress() as bar:
        task = bar.add_task(f"{artifact.manifest.profile}: quality on held-out text", total=None)
        return evaluate(
            loaded,
            artifact,
            HELDOUT_TEXTS,
            protocol=EvaluationProtocol(documents=documents),
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
        )
