"""``python -m benchmarks.quality``: run the evaluation, or draw its report anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from benchmarks.quality import packing, robustness
from benchmarks.quality.artifacts import calibrated
from benchmarks.quality.codecs import CODECS
from benchmarks.quality.models import MODELS, model_spec
from benchmarks.quality.plots import write_plots
from benchmarks.quality.report import (
    compare_bytes,
    equal_quality_table,
    read_scores,
    tables,
    write_results,
    write_score,
)
from benchmarks.quality.run import RunRequest, Step, run_model
from benchmarks.quality.settings import FULL, QUICK
from benchmarks.quality.summary import summarise
from benchmarks.quality.tasks import TASKS, TextTask
from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.calibration.models import load_model, resolve_model
from dynamo_kvtc.cli.output import print_error, print_note, print_table, progress
from dynamo_kvtc.codec.entropy import RansCoder
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.errors import EvaluationError, KvtcError
from dynamo_kvtc.evaluation.environment import describe_environment

_SCORES, _RUN, _RESULTS = "scores.jsonl", "run.json", "results.json"

_Number = TypeVar("_Number", int, float)

_DEFAULT_OUT = Path("quality-output")

#: What every task shows in tables and plots.
_METRICS = {name: task.metrics for name, task in TASKS.items()}

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """Compare codecs on tasks; without a command, run everything with its defaults."""
    if context.invoked_subcommand is None:
        run()


@app.command()
def run(
    models: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(MODELS)}, model folders or .gguf files.")
    ] = "",
    tasks: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(TASKS)}.")] = "",
    codecs: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(CODECS)}.")] = "",
    artifact: Annotated[
        list[str] | None,
        typer.Option(metavar="PROFILE=FOLDER", help="A ready artifact; others are calibrated and kept."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes, one model: a minute or two.")] = False,
    contexts: Annotated[
        int | None, typer.Option(help="Contexts of each length, in tasks that have lengths.", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="dtype of models and caches.")] = "float32",
    tier_block_tokens: Annotated[int, typer.Option(help="Tokens per stream.", min=16)] = 256,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; it must not hold any yet.")
    ] = _DEFAULT_OUT,
) -> None:
    """Measure models, tasks and codecs, and write the report."""
    if threads is not None:
        torch.set_num_threads(threads)
    plan = QUICK if quick else FULL
    request = RunRequest(
        plan=plan.with_contexts(contexts) if contexts else plan,
        tasks=_names(tasks),
        codecs=_names(codecs),
        dtype=dtype,
        tier_block_tokens=tier_block_tokens,
        artifacts=_artifacts(artifact or ()),
    )
    chosen = _names(models) or (["smollm2"] if quick else list(MODELS))
    _open_folder(out)
    described: dict[str, Any] = {
        "quick": quick,
        "contexts": contexts,
        "dtype": dtype,
        "tier_block_tokens": tier_block_tokens,
        "artifacts": {},
    }
    with progress() as bar:
        task = bar.add_task("starting", total=None)

        def show(step: Step) -> None:
            bar.update(task, description=step.stage, completed=step.done, total=step.total)

        for model in chosen:
            artifacts, scores = run_model(model, request, show)
            described["artifacts"][model] = {
                profile: artifact.parameters.artifact_id.hex() for profile, artifact in artifacts.items()
            }
            environment = {"environment": describe_environment(), "settings": described}
            (out / _RUN).write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
            for score in scores:
                write_score(out / _SCORES, score)
    report(out)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of a run, also of an unfinished one.")] = _DEFAULT_OUT,
) -> None:
    """Write results and plots of a run from its scores, and print its tables."""
    scores = read_scores(out / _SCORES)
    described = json.loads((out / _RUN).read_text(encoding="utf-8"))
    rows = summarise(scores)
    compared = compare_bytes(scores)
    write_results(out / _RESULTS, rows, compared, **described)
    paths = write_plots(rows, _METRICS, out)
    for table in tables(rows, _METRICS):
        print_table(table)
    for model, found in compared.items():
        if found:
            print_table(equal_quality_table(model, found))
    print_note("in brackets: 95 % intervals over documents")
    print_note(f"written: {', '.join(str(path) for path in (out / _RESULTS, *paths))}")


@app.command("robustness")
def robustness_command(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)}, a model folder or .gguf file.")
    ] = "smollm2",
    short: Annotated[bool, typer.Option(help="Eight smaller calibrations: less than half an hour.")] = False,
    quick: Annotated[bool, typer.Option(help="Two small calibrations only.")] = False,
    dtype: Annotated[str, typer.Option(help="dtype of model and caches.")] = "float32",
    tier_block_tokens: Annotated[int, typer.Option(help="Tokens per stream.", min=16)] = 256,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; it must not hold any yet.")
    ] = _DEFAULT_OUT,
) -> None:
    """Calibrate rd on less and more text, on single domains and on other draws, and compare the artifacts."""
    if threads is not None:
        torch.set_num_threads(threads)
    plan = robustness.QUICK if quick else robustness.SHORT if short else robustness.FULL
    _open_folder(out)
    scores = []
    with progress() as bar:
        task = bar.add_task("starting", total=None)

        def show(step: Step) -> None:
            bar.update(task, description=step.stage, completed=step.done, total=step.total)

        for score in robustness.run_variants(model, plan, dtype, tier_block_tokens, show):
            write_score(out / _SCORES, score)
            scores.append(score)
    compared = robustness.compare(scores, plan)
    settings: dict[str, Any] = {"model": model, "dtype": dtype, "tier_block_tokens": tier_block_tokens}
    settings |= {"kl": plan.kl, "reference": plan.reference, "calibration": asdict(plan.base)}
    write_results(
        out / _RESULTS,
        summarise(scores),
        {},
        environment=describe_environment(),
        settings=settings,
        bytes_over_reference={
            variant: {group: interval and asdict(interval) for group, interval in by_group.items()}
            for variant, by_group in compared.items()
        },
    )
    print_table(robustness.robustness_table(scores, compared, plan))
    print_note("in brackets: 95 % intervals over documents")
    print_note(f"written: {out / _RESULTS}")


@app.command("packing")
def packing_command(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)}, a model folder or .gguf file.")
    ] = "smollm2",
    artifact: Annotated[
        Path | None, typer.Option(help="A ready artifact of rd; by default the one that `run` uses.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="dtype of model and caches.")] = "float32",
    ratios: Annotated[str, typer.Option(help="Comma-separated nominal ratios; by default all plans.")] = "",
    tier_block_tokens: Annotated[
        str, typer.Option(help="Comma-separated tokens per stream.")
    ] = "64,256,1024",
    entropy: Annotated[str, typer.Option(help="Entropy coder: deflate or rans.")] = "deflate",
    per_domain: Annotated[int, typer.Option(help="Held-out documents of each domain.", min=1)] = 1,
    context_tokens: Annotated[int, typer.Option(help="Tokens of a document.", min=256)] = 2048,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
) -> None:
    """Hold what the streams of rd take against the order-0 entropy of their symbols."""
    chosen = _numbers(ratios, float)
    sizes = _numbers(tier_block_tokens, int)
    if entropy not in ("deflate", "rans"):
        raise EvaluationError(f"there is no entropy coder {entropy!r}: choose deflate or rans")
    coder = RansCoder() if entropy == "rans" else None
    if threads is not None:
        torch.set_num_threads(threads)
    folder = resolve_model(model_spec(model))
    with progress() as bar:
        task = bar.add_task("starting", total=None)

        def show(stage: str, done: float, total: float) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        found_artifact = (
            load_artifact(artifact)
            if artifact
            else calibrated(folder, "rd", dtype, FULL.calibration, lambda step: show(*step))
        )
        loaded = load_model(folder, dtype)
        found_artifact.check_model(loaded.geometry, loaded.rope, loaded.fingerprint.weights_hash)
        parameters = found_artifact.parameters
        found = packing.measure_packing(
            loaded,
            [
                (ratio, RdCodec(parameters, ratio=ratio, coder=coder))
                for ratio in chosen or sorted(parameters.ratios.values())
            ],
            TextTask(per_domain=per_domain, context_tokens=context_tokens).documents(loaded.tokenizer),
            sizes,
            lambda done, total: show("documents", done, total),
        )
    print_table(packing.packing_table(found, entropy))
    if out:
        settings = {
            "model": model,
            "dtype": dtype,
            "artifact": parameters.artifact_id.hex(),
            "entropy": entropy,
        }
        rows = [{**asdict(one), "excess": one.excess} for one in found]
        result = {"environment": describe_environment(), "settings": settings, "rows": rows}
        out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print_note(f"written: {out}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str, number: Callable[[str], _Number]) -> list[_Number]:
    try:
        return [number(name) for name in _names(text)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers") from None


def _artifacts(options: Any) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for option in options:
        profile, separator, folder = option.partition("=")
        if not (profile and separator and folder):
            raise typer.BadParameter(f"{option!r} is not PROFILE=FOLDER", param_hint="--artifact")
        found.setdefault(profile, []).append(Path(folder))
    return found


def _open_folder(out: Path) -> None:
    if (out / _SCORES).exists():
        raise EvaluationError(f"{out} holds the scores of another run; choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)


def main() -> None:
    """Run the command line; errors that a user can mend are printed and end with status 1."""
    try:
        app()
    except KvtcError as error:
        print_error(error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
