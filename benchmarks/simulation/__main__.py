"""``python -m benchmarks.simulation``: run the simulation, write its results and its plot."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.simulation.cluster import ClusterSettings
from benchmarks.simulation.measured import Measured, read_measured
from benchmarks.simulation.plot import write_plot
from benchmarks.simulation.run import NOTHING, Outcome, Plan, Speed, run_all
from benchmarks.simulation.trace import TraceSettings
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, resolve_model
from dynamo_kvtc.cli.output import make_table, print_note, print_table
from dynamo_kvtc.evaluation.environment import describe_environment

_RESULTS = Path(__file__).parents[1] / "results"
_IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main(
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = _RESULTS / "simulation.json",
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = _IMAGES / "simulation.png",
    ratio: Annotated[float | None, typer.Option(help="Instead of the measured ratio.")] = None,
    onboard_speed: Annotated[float | None, typer.Option(help="Instead of the measured one.")] = None,
    encode_speed: Annotated[float | None, typer.Option(help="Instead of the measured one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the trace.")] = 1,
    quick: Annotated[bool, typer.Option(help="A tenth of the trace and one size: does it run?")] = False,
) -> None:
    """Show what the tier does to a cluster's hit rate and time to first token."""
    measured = read_measured(_RESULTS)
    measured = dataclasses.replace(
        measured,
        ratio=ratio or measured.ratio,
        onboard_speed=onboard_speed or measured.onboard_speed,
        encode_speed=encode_speed or measured.encode_speed,
    )
    trace = TraceSettings(seed=seed)
    plan = Plan(ClusterSettings(model=resolve_model(BUILTIN_SMOLLM2)), trace, measured)
    if quick:
        small = dataclasses.replace(trace, conversations=4, requests=16)
        cluster = dataclasses.replace(plan.cluster, gpu_blocks=288)
        plan = dataclasses.replace(plan, trace=small, cluster=cluster, memory=(0.2,))
    with tempfile.TemporaryDirectory(prefix="kvtc-simulation-") as folder:
        outcomes, speed, ceiling = run_all(plan, Path(folder), print_note)
    report = _report(plan, measured, outcomes, speed, ceiling)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_plot(outcomes, ceiling, plot)
    _print(outcomes)
    print_note(f"written: {results}, {plot}")


def _report(
    plan: Plan, measured: Measured, outcomes: list[Outcome], speed: Speed, ceiling: float
) -> dict[str, Any]:
    environment = describe_environment()
    environment["versions"] |= {name: version(name) for name in ("ai-dynamo", "ai-dynamo-runtime")}
    cluster = dataclasses.asdict(plan.cluster)
    del cluster["model"]
    return {
        "benchmark": "Simulated cluster",
        "measured": dataclasses.asdict(measured),
        "trace": dataclasses.asdict(plan.trace),
        "cluster": cluster | {"users": plan.users},
        "mocker_seconds": dataclasses.asdict(speed),
        "hit_rate_of_an_endless_cache": ceiling,
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        "environment": environment,
    }


def _print(outcomes: list[Outcome]) -> None:
    nothing = next(outcome for outcome in outcomes if outcome.tier == NOTHING)
    rows = [
        (
            outcome.tier,
            f"{outcome.memory:.0%}",
            f"{outcome.hit_rate:.1%}",
            f"{outcome.ttft_median_s / nothing.ttft_median_s:.2f}",
            f"{outcome.ttft_p90_s / nothing.ttft_p90_s:.2f}",
        )
        for outcome in outcomes
    ]
    columns = ("tier", "host memory", "hit rate", "TTFT, median", "TTFT, 90 %")
    print_table(make_table("Simulated cluster", columns, rows))
    print_note("times relative to no host tier")


if __name__ == "__main__":
    typer.run(main)
