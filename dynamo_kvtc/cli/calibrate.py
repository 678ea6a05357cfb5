"""``dynamo-kvtc calibrate``: fit an artifact to a model."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_kvtc.cli.output import JsonFlag, make_table, print_json, print_note, print_table, progress
from dynamo_kvtc.cli.parsing import parse_divergences, parse_ratios
from dynamo_kvtc.codec.header import MAX_DIMENSION

if TYPE_CHECKING:
    from dynamo_kvtc.calibration.run import Progress

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Option(help="Hugging Face folder, .gguf file or builtin:smollm2.")],
    text: Annotated[
        list[Path],
        typer.Option(help="UTF-8 text to calibrate on: one file or more.", exists=True, dir_okay=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the artifact to.", file_okay=False)],
    more_text: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Further files of --text.", exists=True, dir_okay=False),
    ] = None,
    profile: Annotated[str, typer.Option(help="rd, or kvtc: the published method.")] = "rd",
    tokens: Annotated[int, typer.Option(help="Tokens to prefill in all.", min=1)] = 40_000,
    ratios: Annotated[
        str | None, typer.Option(help="Ratios to make plans for; 10,20,40,80 with rd, 8,16,32 with kvtc.")
    ] = None,
    max_kl: Annotated[
        str | None,
        typer.Option(help="Next-token divergences in nats to make further plans for, such as 0.004,0.015."),
    ] = None,
    validation_documents: Annotated[
        int, typer.Option(help="Documents kept back to measure the plans of rd on.", min=1)
    ] = 2,
    sensitivity: Annotated[
        str, typer.Option(help="gradients, or forward: for models too large for a backward pass.")
    ] = "gradients",
    recall_share: Annotated[
        float | None,
        typer.Option(
            help="Share of documents that are generated to ask for facts stated before.", min=0, max=1
        ),
    ] = None,
    layers_per_group: Annotated[
        str, typer.Option(help="Consecutive layers that share a basis: a number, all, or auto.")
    ] = "auto",
    document_tokens: Annotated[int, typer.Option(help="Tokens of one document.", min=1)] = 2048,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same artifact.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; by default its own choice.", min=1)
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto, eigh (exact) or randomised (for very large rows).")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="dtype of the KV cache: bfloat16, float16 or float32.")
    ] = "bfloat16",
    json: JsonFlag = False,
) -> None:
    """Fit an artifact to a model: bases, bit plans, expected errors.

    Ctrl-C keeps what is done; the same command continues. A ready artifact of the same model, text and
    settings is reused.
    """
    from dynamo_kvtc.calibration.fit import FitMethod
    from dynamo_kvtc.calibration.report import summarise
    from dynamo_kvtc.calibration.run import calibrate
    from dynamo_kvtc.calibration.settings import CalibrationSettings

    settings = CalibrationSettings(
        model=model,
        texts=(*text, *(more_text or ())),
        out=out,
        profile=profile,
        tokens=tokens,
        ratios=() if ratios is None else tuple(parse_ratios(ratios)),
        max_kls=() if max_kl is None else tuple(parse_divergences(max_kl)),
        validation_documents=validation_documents,
        sensitivity=sensitivity,
        recall_share=recall_share,
        layers_per_group=_parse_layers(layers_per_group),
        document_tokens=document_tokens,
        seed=seed,
        threads=threads,
        method=_parse_method(method, FitMethod),
        dtype=dtype,
    )
    began = time.monotonic()
    with _stop_on_interrupt() as should_stop, _progress_bar() as (report, was_used):
        artifact = calibrate(settings, report, should_stop)
    summary = summarise(artifact)
    result = {
        "folder": str(out),
        "reused": not was_used(),
        "seconds": round(time.monotonic() - began, 3),
        **summary,
    }
    if json:
        print_json(result)
        return
    print_note(f"{'reused' if result['reused'] else 'wrote'} {out} (report: {out / 'report.md'})")
    print_table(_table(summary))


def _table(summary: dict[str, Any]) -> Any:
    is_rd = summary["profile"] == "rd"
    columns = ["ratio" if is_rd else "ratio (nominal)", "key error", "value error", "bits/token"]
    return make_table(
        f"artifact {summary['id'][:16]}, profile {summary['profile']}",
        [*columns, "measured ratio", "KL", "top-1"] if is_rd else columns,
        [
            [
                f"{ratio['ratio']:g}",
                f"{ratio['key_error']:.4f}",
                f"{ratio['value_error']:.4f}",
                f"{ratio['bits_per_token']:,.0f}",
                *(_measured(ratio["measured"]) if is_rd else ()),
            ]
            for ratio in summary["ratios"]
        ],
    )


def _measured(measured: dict[str, Any]) -> list[str]:
    return [f"{measured['ratio']:.1f}x", f"{measured['kl']:.4f}", f"{measured['top1']:.1%}"]


def _parse_layers(text: str) -> int | None:
    if text in ("all", "auto"):
        return MAX_DIMENSION if text == "all" else None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no number, all or auto", param_hint="--layers-per-group")
    return int(text)


def _parse_method(text: str, methods: Any) -> Any:
    known = [method.value for method in methods]
    if text not in known:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(known)}", param_hint="--method")
    return methods(text)


@contextmanager
def _progress_bar() -> Iterator[tuple[Callable[[Progress], None], Callable[[], bool]]]:
    """Show one bar over all stages; also tell whether there was anything to show."""
    with progress() as bar:
        task = bar.add_task("prepare", total=None)
        used = False

        def report(step: Progress) -> None:
            nonlocal used
            used = True
            percent = round(100 * step.done / step.total)
            bar.update(task, description=step.stage, completed=percent, total=100)

        yield report, lambda: used


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C finish the piece of work at hand; a second one ends at once."""
    stop = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)
        print_note("stopping after the current step; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)
