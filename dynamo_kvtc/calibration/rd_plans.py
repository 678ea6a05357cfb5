"""Plans of the rd profile: from coefficients of sampled rows to roundings, offsets and symbol classes.

For a given step, every component gets the dead zone that minimises ``distortion + LAGRANGIAN * rate``,
the rate being the entropy of its symbols; a component that is better not stored at all is left out
(entropy-constrained scalar quantisation: Chou, Lookabaugh and Gray 1989, here with uniform intervals).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.rd_plan import RdPlan, SymbolClass

__all__ = ["FittedPlan", "estimate_rate", "fit_plan"]

#: Squared error, in squared steps, that one bit is worth. At high rates ``-dD/dR = 2 ln(2) D`` with
#: ``D = 1/12``.
LAGRANGIAN = 2 * 0.6931 / 12

#: Roundings that are tried.
ROUNDINGS = (0.50, 0.44, 0.39, 0.34, 0.29, 0.24, 0.19)

#: Components whose symbols have less entropy are left out: DEFLATE would spend a fifth of a bit on them all
#: the same, and they take their share of the products (docs/science.md has what that saves and costs).
MINIMUM_RATE = 0.3

#: Bits that one escape costs, measured on streams: its gap and its value after DEFLATE.
ESCAPE_BITS = 14.0

#: Components with a smaller mean square, in squared steps, are not looked at: they are never worth a bit.
_NEGLIGIBLE = 0.004

#: Symbols that share a byte.
_PER_BYTE = {SymbolClass.BYTE: 1, SymbolClass.NIBBLE: 2, SymbolClass.TRIT: 5}

#: Bits that the second byte of a WIDE symbol costs, measured on streams.
_SECOND_BYTE = 0.2

#: Rows of the sample that a rate is estimated from.
_ESTIMATED_ROWS = 384

#: Magnitudes counted apart; larger ones are taken to cost what an Elias gamma code would take.
_COUNTED = 40


@dataclass(frozen=True, eq=False)
class FittedPlan:
    """A plan and what it takes and loses on the sampled rows.

    Attributes
    ----------
    plan : RdPlan
        The plan.
    bits : float
        Entropy of all stored symbols, bits a token.
    decoded : torch.Tensor
        float32 ``[tokens, stored]``: what the sampled coefficients decode to, columns as in
        ``plan.components``, scales not undone.
    """

    plan: RdPlan
    bits: float
    decoded: torch.Tensor


def fit_plan(coefficients: torch.Tensor, step: float) -> FittedPlan:
    """Fit a plan.

    Parameters
    ----------
    coefficients : torch.Tensor
        float32 ``[tokens, components]``, scaled by the tokens' importance; some hundred rows at least.
    step : float
        Width of the quantisation intervals.
    """
    candidates = _candidates(coefficients, step)
    u = coefficients[:, candidates] / step
    magnitudes = u.abs()
    best = _Trials(candidates.numel())
    for rounding in ROUNDINGS:
        best.update(rounding, *_try(u, magnitudes, rounding))
    kept = (best.costs < magnitudes.square().mean(0)) & (best.rates > MINIMUM_RATE)
    classes = _classes(magnitudes, best)
    # Class by class, in each by falling rate; stable, so that equal rates keep the order of variances.
    order = torch.argsort(classes.double() * 1e6 - best.rates.double(), stable=True)
    order = order[kept[order]]
    chosen = classes[order]
    offsets = best.offsets[:, order].clamp(-0.99, 0.99)
    plan = RdPlan(
        step=step,
        components=candidates[order],
        counts=tuple(int((chosen == symbol_class).sum()) for symbol_class in SymbolClass),  # type: ignore[arg-type]
        rounding=best.roundings[order],
        offsets=offsets,
    )
    q = (magnitudes[:, order] + plan.rounding).floor()
    decoded = _reconstruct(q, offsets) * u[:, order].sign() * step
    return FittedPlan(plan, float(best.rates[order].sum()), decoded)


def estimate_rate(coefficients: torch.Tensor, step: float) -> float:
    """Estimate, with one rounding for all, the bits a token that a plan with this step would take.

    Parameters
    ----------
    coefficients : torch.Tensor
        float32 ``[tokens, components]`` of sampled rows, scaled by their importance.
    """
    some = coefficients[:: max(1, coefficients.shape[0] // _ESTIMATED_ROWS)]
    u = some[:, _candidates(some, step)] / step
    _, distortion, rates = _try(u, u.abs(), 0.34)
    kept = (distortion + LAGRANGIAN * rates < u.square().mean(0)) & (rates > MINIMUM_RATE)
    return float(rates[kept].sum())


def _candidates(coefficients: torch.Tensor, step: float) -> torch.Tensor:
    """Return the components that may be worth storing: int64."""
    return (coefficients.square().mean(0) > _NEGLIGIBLE * step * step).nonzero()[:, 0]


class _Trials:
    """The best rounding of each component so far."""

    def __init__(self, components: int) -> None:
        self.costs = torch.full((components,), torch.inf)
        self.roundings = torch.empty(components)
        self.rates = torch.empty(components)
        self.offsets = torch.empty(2, components)

    def update(
        self,
        rounding: float,
        offsets: torch.Tensor,
        distortion: torch.Tensor,
        rates: torch.Tensor,
    ) -> None:
        costs = distortion + LAGRANGIAN * rates
        better = costs < self.costs
        self.costs = torch.where(better, costs, self.costs)
        self.roundings = self.roundings.masked_fill(better, rounding)
        self.rates = torch.where(better, rates, self.rates)
        self.offsets = torch.where(better, offsets, self.offsets)


def _try(
    u: torch.Tensor, magnitudes: torch.Tensor, rounding: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise with one rounding.

    Returns
    -------
    tuple
        Per component the best offsets ``[2, components]``, the mean squared error in squared steps, and
        the entropy in bits.
    """
    q = (magnitudes + rounding).floor()
    excess = magnitudes - q
    ones, more = q == 1, q >= 2
    offsets = torch.stack([_mean_where(excess, ones), _mean_where(excess, more)])
    distortion = (magnitudes - _reconstruct(q, offsets)).square().mean(0)
    return offsets, distortion, _entropy(q * u.sign())


def _mean_where(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return torch.where(chosen, values, 0.0).sum(0) / chosen.sum(0).clamp_min(1)


def _reconstruct(q: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.where(q == 0, 0.0, q + torch.where(q == 1, offsets[0], offsets[1]))


def _entropy(symbols: torch.Tensor) -> torch.Tensor:
    """Return the order-0 entropy of each column of ``[tokens, components]``, in bits a symbol."""
    tokens, components = symbols.shape
    alphabet = 2 * _COUNTED + 1
    index = symbols.clamp(-_COUNTED, _COUNTED).long() + _COUNTED
    index += torch.arange(components) * alphabet
    counts = torch.bincount(index.flatten(), minlength=components * alphabet).view(components, alphabet)
    shares = counts / tokens
    entropy = -torch.xlogy(shares, shares).sum(1) / torch.log(torch.tensor(2.0))
    beyond = (symbols.abs() - _COUNTED + 1).clamp_min(1)
    return entropy + 2 * beyond.log2().mean(0)


def _classes(magnitudes: torch.Tensor, best: _Trials) -> torch.Tensor:
    """Choose each component's cheapest class: int64 ``[components]``."""
    q = (magnitudes + best.roundings).floor()
    costs = [best.rates + _SECOND_BYTE]
    for symbol_class, per_byte in _PER_BYTE.items():
        escapes = (q > symbol_class.limit).float().mean(0)
        costs.append(_deflated(best.rates, per_byte) + ESCAPE_BITS * escapes)
    return torch.stack(costs).argmin(0)


def _deflated(rates: torch.Tensor, per_byte: int) -> torch.Tensor:
    """Return the bits that DEFLATE spends on a symbol: its rate, but hardly less than a bit for each byte.

    The transition between the two was fitted to streams of a real model.
    """
    return (1 + (per_byte * rates) ** 3) ** (1 / 3) / per_byte
