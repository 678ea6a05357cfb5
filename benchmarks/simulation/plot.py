"""The simulation's plot: hit rate and time to first token against host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulation.run import COMPRESSED, NOTHING, PLAIN, Outcome

__all__ = ["write_plot"]

_COLOURS = {PLAIN: "#dd8452", COMPRESSED: "#4c72b0"}


def write_plot(outcomes: Sequence[Outcome], ceiling: float, path: Path) -> None:
    """Write a PNG.

    Parameters
    ----------
    ceiling : float
        Hit rate of an endless cache.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    hits, ttft = figure.subplots(1, 2)
    nothing = next(outcome for outcome in outcomes if outcome.tier == NOTHING)
    _draw(hits, outcomes, lambda outcome: 100 * outcome.hit_rate)
    hits.axhline(100 * ceiling, color="0.6", linestyle=":", label="endless cache")
    hits.axhline(100 * nothing.hit_rate, color="0.3", linestyle="--", label=NOTHING)
    hits.set_ylabel("prompt tokens served from caches (%)")
    hits.set_ylim(0, 100)
    _draw(ttft, outcomes, lambda outcome: outcome.ttft_median_s / nothing.ttft_median_s)
    ttft.axhline(1, color="0.3", linestyle="--", label=NOTHING)
    ttft.set_ylabel("median time to first token, no host tier = 1")
    ttft.set_ylim(0, 1.3)
    for axes in (hits, ttft):
        axes.set_xlabel("host memory, % of the trace's plain KV")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> None:
    for tier, colour in _COLOURS.items():
        rows = [outcome for outcome in outcomes if outcome.tier == tier]
        axes.plot(
            [100 * row.memory for row in rows], [value(row) for row in rows], "o-", color=colour, label=tier
        )
