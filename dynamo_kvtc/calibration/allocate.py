"""Bit plans by dynamic programming over successive components (KVTC, section 3.2).

``best[i][b]`` is the least error of the first ``i`` components with at most ``b`` bits::

    best[i][b] = min( best[i-1][b] + energy(i-1),
                      min over sizes s and types t of best[i-s][b - cost(s, t)] + error(i-s .. i, t) )

The first line leaves a component out. Errors are measured: the mean over sampled tokens of the squared
error of simulated quantisation. A group of more than 16 components may start only at multiples of
``size / 16``, which divides the number of windows to measure and costs next to nothing, since the
spectrum is flat over so few components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dynamo_kvtc.codec.plan import GROUP_SIZES, BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.quantiser import simulate
from dynamo_kvtc.errors import CalibrationError

__all__ = ["ErrorTable", "budget_bits", "measure_errors", "plan_bits", "start_step"]

#: Types that store something, in the order of the error table.
STORED_TYPES = (QuantType.INT2, QuantType.INT4, QuantType.FP8)

#: Components quantised at once while measuring; bounds the memory of the windows.
_WINDOW_ELEMENTS = 1 << 20

#: Cells of the table of choices, a byte each; budgets are counted in larger units beyond it.
_CHOICE_CELLS = 1 << 29

#: All costs are even, so two bits are the finest unit that matters.
_FINEST_UNIT = 2


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Measured squared errors per token of everything that a plan can do with the components.

    Attributes
    ----------
    energy : npt.NDArray[np.float64]
        ``[components]``: error of leaving a component out.
    windows : dict[int, npt.NDArray[np.float64]]
        By group size: ``[types, starts]``, the error of a group that starts at component
        ``index * start_step(size)``, with types as in `STORED_TYPES`. Sizes beyond the number of
        components are absent.
    """

    energy: npt.NDArray[np.float64]
    windows: dict[int, npt.NDArray[np.float64]]


def start_step(size: int) -> int:
    """Return the step between the components at which a group of this size may start."""
    return max(1, size // 16) if size > 16 else 1


def budget_bits(row: int, ratio: float) -> int:
    """Return the bits per token that a plan may spend on one side at a nominal ratio.

    Raises
    ------
    CalibrationError
        If the ratio is not above 1.
    """
    if not ratio > 1:
        raise CalibrationError(f"a nominal ratio must be above 1, not {ratio:g}")
    return int(16 * row / ratio)


def measure_errors(coefficients: torch.Tensor) -> ErrorTable:
    """Simulate every group that a plan may contain.

    Parameters
    ----------
    coefficients : torch.Tensor
        float32 ``[components, tokens]``: sampled rows, centred and projected; component-major, since
        reductions over a group are several times faster when neighbours in memory are tokens.

    Raises
    ------
    EncodeRangeError
        If coefficients exceed the range of the quantiser's side data.
    """
    coefficients = coefficients.contiguous()
    energy = coefficients.double().square().mean(dim=1).numpy()
    sizes = [size for size in GROUP_SIZES if size <= len(coefficients)]
    tasks = [(size, type_) for size in sizes for type_ in STORED_TYPES]
    with _single_threaded_workers() as workers:
        errors = dict(
            zip(tasks, workers.map(lambda task: _window_errors(coefficients, *task), tasks), strict=True)
        )
    windows = {size: np.stack([errors[size, type_] for type_ in STORED_TYPES]) for size in sizes}
    return ErrorTable(energy, windows)


@contextmanager
def _single_threaded_workers() -> Iterator[ThreadPoolExecutor]:
    """Yield as many workers as torch has threads, with one torch thread each.

    Windows are measured with very many small operations. Split among torch's own threads, every one of them
    waits for the slowest thread, which makes it a hundred times slower where cores are shared.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)  # part of the setting is common to all threads


def _window_errors(coefficients: torch.Tensor, size: int, type_: QuantType) -> npt.NDArray[np.float64]:
    tokens = coefficients.shape[1]
    windows = coefficients.unfold(0, size, start_step(size))  # [starts, tokens, size]
    at_once = max(1, _WINDOW_ELEMENTS // (tokens * size))
    errors = [
        (simulate(part, type_) - part).square().sum(dim=(1, 2), dtype=torch.float64) / tokens
        for part in torch.split(windows, at_once)
    ]
    return torch.cat(errors).numpy()


def plan_bits(table: ErrorTable, budgets: Sequence[int]) -> list[BitPlan]:
    """Find the plan of least error for each budget.

    One table for the largest budget serves all. Costs are exact as long as the table stays within its
    bound; for very large budgets they are counted in coarser units and rounded up, so that a budget is
    never exceeded.

    Parameters
    ----------
    table : ErrorTable
        What `measure_errors` returned.
    budgets : Sequence[int]
        Bits per token, side data counted, before entropy coding.

    Returns
    -------
    list[BitPlan]
        One plan per budget.
    """
    components = len(table.energy)
    unit = _budget_unit(components, max(budgets))
    options = _options(table, unit)
    choices = _fill(table, options, max(budgets) // unit)
    return [_trace(choices, options, components, budget // unit) for budget in budgets]


@dataclass(frozen=True, slots=True, eq=False)
class _Option:
    """One (size, type) with its cost in units and its errors by start index."""

    size: int
    type: QuantType
    cost: int
    step: int
    errors: npt.NDArray[np.float64]


def _budget_unit(components: int, budget: int) -> int:
    cells = (components + 1) * (budget // _FINEST_UNIT + 1)
    return _FINEST_UNIT * max(1, -(-cells // _CHOICE_CELLS))


def _options(table: ErrorTable, unit: int) -> list[_Option]:
    return [
        _Option(size, type_, -(-PlanGroup(0, size, type_).bits // unit), start_step(size), errors)
        for size, by_type in table.windows.items()
        for type_, errors in zip(STORED_TYPES, by_type, strict=True)
    ]


def _fill(table: ErrorTable, options: Sequence[_Option], budget: int) -> npt.NDArray[np.uint8]:
    """Run the recurrence; return for each cell 0 (leave the component out) or the option's number + 1.

    Every row is non-increasing in the budget, because row 0 is constant: "at most b bits" needs no
    comparison with ``best[i][b-1]``.
    """
    components = len(table.energy)
    history = max((option.size for option in options), default=1) + 1  # rows that the recurrence reaches back
    best = np.zeros((history, budget + 1))
    choices = np.zeros((components + 1, budget + 1), dtype=np.uint8)
    for stop in range(1, components + 1):
        row = best[(stop - 1) % history] + table.energy[stop - 1]
        choice = choices[stop]
        for number, option in enumerate(options, start=1):
            start = stop - option.size
            if start < 0 or start % option.step or option.cost > budget:
                continue
            candidate = (
                best[start % history, : budget + 1 - option.cost] + option.errors[start // option.step]
            )
            target = row[option.cost :]
            better = candidate < target
            np.copyto(target, candidate, where=better)
            np.copyto(choice[option.cost :], np.uint8(number), where=better)
        best[stop % history] = row
    return choices


def _trace(
    choices: npt.NDArray[np.uint8], options: Sequence[_Option], components: int, budget: int
) -> BitPlan:
    groups: list[PlanGroup] = []
    stop = components
    while stop:
        number = int(choices[stop, budget])
        if number == 0:
            stop -= 1
            continue
        option = options[number - 1]
        stop -= option.size
        budget -= option.cost
        groups.append(PlanGroup(stop, option.size, option.type))
    return BitPlan(tuple(reversed(groups)))
