"""Rate control of the rd profile: which step reaches a ratio, or stays within a divergence.

One step serves all sides and layer groups, because the metric makes their errors commensurable. Steps are
found by the entropy of sampled symbols, then corrected by what real streams of validation documents take,
and what the model makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dynamo_kvtc.calibration.artifact_writer import MeasuredPlan
from dynamo_kvtc.calibration.rd_plans import FittedPlan, estimate_rate, fit_plan
from dynamo_kvtc.errors import CalibrationError, EncodeRangeError

__all__ = ["PlanSearch", "Rung"]

#: What streams take beyond the entropy of their symbols: levels, headers, chunks and DEFLATE. A first
#: guess, which measured streams correct.
_OVERHEAD = 1.08

#: How far a measured ratio may lie from the wanted one to be taken at once, and at most.
_RATIO_TOLERANCE = 0.01
_RATIO_LIMIT = 0.1

#: Steps that are tried for a ratio, whose measuring takes encoding alone, and for a divergence.
_RATIO_TRIES = 5
_KL_TRIES = 3

#: A divergence's step aims this far below the limit, so that it rarely needs a second try.
_KL_MARGIN = 0.97


@dataclass(frozen=True, eq=False)
class Rung:
    """Plans of all sides at one step.

    Attributes
    ----------
    step : float
        Width of the quantisation intervals.
    plans : Sequence[FittedPlan]
        In the order of the coefficients that `PlanSearch` was given.
    measured : MeasuredPlan
        What validation documents gave.
    """

    step: float
    plans: Sequence[FittedPlan]
    measured: MeasuredPlan


class PlanSearch:
    """Finds steps.

    Parameters
    ----------
    coefficients : Sequence[torch.Tensor]
        Scaled coefficients of sampled rows, float32 ``[tokens, components]``, of every side.
    row_bits : int
        Bits of a token's keys and values at 16 bits an element.
    ratio_of, measure : Callable[[Sequence[FittedPlan]], ...]
        What real streams under these plans reach: the ratio alone, or all that is measured.
    """

    def __init__(
        self,
        coefficients: Sequence[torch.Tensor],
        row_bits: int,
        ratio_of: Callable[[Sequence[FittedPlan]], float],
        measure: Callable[[Sequence[FittedPlan]], MeasuredPlan],
    ) -> None:
        self._coefficients = coefficients
        self._row_bits = row_bits
        self._ratio_of = ratio_of
        self._measure = measure
        # What was learnt with one ratio is a better first guess for the next.
        self._overhead = _OVERHEAD
        self._largest = max(float(c.square().mean(0).max()) for c in coefficients) ** 0.5

    def for_ratio(self, ratio: float) -> Rung:
        """Return plans whose streams reach a ratio: to a percent if few corrections do it, else the closest.

        Raises
        ------
        CalibrationError
            If no step does, to ten percent.
        """
        tried: list[tuple[float, float, list[FittedPlan]]] = []
        for _ in range(_RATIO_TRIES):
            step = self._step_of(self._row_bits / ratio / self._overhead, ratio)
            plans = self._fit(step)
            try:
                reached = self._ratio_of(plans)
            except EncodeRangeError as error:
                raise CalibrationError(
                    f"streams cannot hold the validation documents at a ratio of {ratio:g}: the step is too "
                    "small for symbols of 16 bits, or they are too unlike the other documents; ask for a "
                    "higher ratio"
                ) from error
            tried.append((reached, step, plans))
            if abs(reached / ratio - 1) <= _RATIO_TOLERANCE:
                break
            self._overhead *= ratio / reached
        reached, step, plans = min(tried, key=lambda one: abs(one[0] / ratio - 1))
        if abs(reached / ratio - 1) > _RATIO_LIMIT:
            raise CalibrationError(
                f"no step reaches a ratio of {ratio:g}, the closest one gives {reached:.3g}; ask for that "
                "or another ratio"
            )
        return Rung(step, plans, self._measure(plans))

    def for_divergence(self, max_kl: float, known: Sequence[Rung]) -> Rung:
        """Return the plans with the highest ratio found whose measured divergence is at most `max_kl`.

        Parameters
        ----------
        max_kl : float
            In nats.
        known : Sequence[Rung]
            At least one; the logarithm of the step is interpolated, or extrapolated, from the logarithm
            of their divergences.

        Raises
        ------
        CalibrationError
            If the divergence stays larger however small the step.
        """
        rungs = list(known)
        for _ in range(_KL_TRIES):
            step = _interpolate_step(rungs, max_kl * _KL_MARGIN)
            plans = self._fit(step)
            try:
                rungs.append(Rung(step, plans, self._measure(plans)))
            except EncodeRangeError:
                break  # symbols are too narrow for so small a step
            if 0.9 * max_kl <= rungs[-1].measured.kl <= max_kl:
                break
        good = [rung for rung in rungs if rung.measured.kl <= max_kl]
        if not good:
            best = min(rung.measured.kl for rung in rungs)
            raise CalibrationError(
                f"no step reached a KL of {max_kl:g} on the validation documents; the smallest one tried "
                f"gave {best:.2g}. Models in 16 bits have a noise floor of about .002: allow more, or "
                "calibrate in float32"
            )
        return max(good, key=lambda rung: rung.measured.ratio)

    def _fit(self, step: float) -> list[FittedPlan]:
        return [fit_plan(coefficients, step) for coefficients in self._coefficients]

    def _step_of(self, bits: float, ratio: float) -> float:
        """Return the step at which the symbols' entropy is so many bits a token, by bisection."""
        low, high = math.log(self._largest * 1e-5), math.log(self._largest * 4)
        for _ in range(14):
            middle = (low + high) / 2
            rate = sum(estimate_rate(c, math.exp(middle)) for c in self._coefficients)
            low, high = (low, middle) if rate < bits else (middle, high)
        if not self._largest * 2e-5 < math.exp(low) < self._largest * 2:
            raise CalibrationError(f"no step reaches a ratio of {ratio:g}; ask for one between 4 and 200")
        return math.exp((low + high) / 2)


def _interpolate_step(rungs: Sequence[Rung], kl: float) -> float:
    """Return the step at which a line through the two nearest rungs, in logarithms, meets a divergence."""
    points = sorted((math.log(max(rung.measured.kl, 1e-9)), math.log(rung.step)) for rung in rungs)
    wanted = math.log(kl)
    if len(points) == 1:
        # Divergence grows about as the square of the step.
        return math.exp(points[0][1] + (wanted - points[0][0]) / 2)
    above = next((i for i, (log_kl, _) in enumerate(points) if log_kl >= wanted), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(above, 1) - 1], points[max(above, 1)]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.5
    # Noise can make neighbours' slopes absurd; two rungs apart by a factor are never that far off.
    return math.exp(y0 + (wanted - x0) * min(max(slope, 0.2), 1.0))
