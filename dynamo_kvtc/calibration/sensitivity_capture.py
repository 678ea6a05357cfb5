"""Run a model over a document and take out what its predictions feel of every cached token.

The first tokens of a document are the context, the rest are scored. The context is prefilled without
gradients; the scored tokens run behind its cache, and one backward pass gives the gradients of their
log-likelihood with respect to the context's keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dynamo_kvtc.calibration.capture import SINK_TOKENS, read_cache
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.transformers_cache import cache_argument, cache_of
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import CalibrationError

__all__ = ["DocumentCut", "SensitivityRows", "capture_sensitivity", "pull_back"]


@dataclass(frozen=True, slots=True)
class DocumentCut:
    """Which tokens of a document are sinks, coded, recent window and scored, in this order.

    Attributes
    ----------
    tokens : int
        Length of the document.
    scored_tokens, recent_window : int
        Tokens at its end whose predictions count, and tokens before them that are never compressed.

    Raises
    ------
    CalibrationError
        If a number is out of range, or no token is left to be coded.
    """

    tokens: int
    scored_tokens: int
    recent_window: int

    def __post_init__(self) -> None:
        if self.scored_tokens < 1 or self.recent_window < 0:
            raise CalibrationError(
                f"{self.scored_tokens} scored tokens behind a recent window of {self.recent_window} cannot "
                "be cut off; score at least one token, behind a window of none or more"
            )
        if self.stop <= SINK_TOKENS:
            needed = SINK_TOKENS + 1 + self.recent_window + self.scored_tokens
            raise CalibrationError(
                f"a document of {self.tokens} tokens is too short for {self.scored_tokens} scored tokens "
                f"behind a recent window of {self.recent_window}; give documents of at least {needed} tokens"
            )

    @property
    def context(self) -> int:
        """Tokens before the scored ones."""
        return self.tokens - self.scored_tokens

    @property
    def stop(self) -> int:
        """One past the last coded position; the first one is `SINK_TOKENS`."""
        return self.context - self.recent_window

    @property
    def coded(self) -> slice:
        """Coded positions."""
        return slice(SINK_TOKENS, self.stop)


@dataclass(frozen=True, eq=False)
class SensitivityRows:
    """Coded tokens of one document with the gradients of a log-likelihood.

    Attributes
    ----------
    keys, values : torch.Tensor
        float32 ``[tokens, row_size]``: keys before RoPE and values of positions `SINK_TOKENS` to the
        recent window, layer-major, then head, then channel, as from `capture_rows`.
    key_gradients, value_gradients : torch.Tensor
        Of the same shape and dtype: the derivatives (nats per unit) with respect to `keys` and `values`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_gradients: torch.Tensor
    value_gradients: torch.Tensor


def capture_sensitivity(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    *,
    scored_tokens: int,
    recent_window: int,
    seed: int,
) -> SensitivityRows:
    """Differentiate the log-likelihood of a document's last tokens by its cached keys and values.

    Of all ways in which a token acts upon the loss, only that through the cache, upon tokens more than
    `recent_window` positions behind it, is felt by compression: the window is kept raw, and what the
    tokens of the context have read is never compressed again. So each cached tensor is a variable of its
    own, whatever it was computed from, and only the tokens behind context and window are scored.
    Gradients of plain training would be dominated by nearby tokens instead.

    The labels are sampled from the model's own predictions. The second moment of these gradients then is
    the Fisher information, which is the curvature of the KL divergence from the model's predictions; with
    the document's own tokens as labels it is the empirical Fisher, which is not (Kunstner et al. 2019,
    "Limitations of the empirical Fisher approximation").

    Memory holds the context's cache, the graph of the scored tokens and the result. The same arguments
    give the same result on the same machine with the same number of threads.

    Parameters
    ----------
    loaded : LoadedModel
        The model; its parameters collect no gradients.
    token_ids : Sequence[int]
        One document.
    scored_tokens : int
        Tokens at the end whose predictions are scored; the rest is context.
    recent_window : int
        Tokens at the end of the context that compression leaves alone.
    seed : int
        Draws the labels; a number of its own for each document makes the draws independent.

    Returns
    -------
    SensitivityRows
        For the positions `SINK_TOKENS` to ``len(token_ids) - scored_tokens - recent_window - 1``.

    Raises
    ------
    CalibrationError
        If the document is too short, the model's cache is not one of plain keys and values or does not
        carry gradients, or keys, values, predictions or gradients hold NaN or infinity.
    """
    cut = DocumentCut(len(token_ids), scored_tokens, recent_window)
    ids = torch.tensor([list(token_ids)])
    with _frozen_parameters(loaded.model):
        with torch.no_grad():
            cache = cache_of(loaded.model.base_model(input_ids=ids[:, : cut.context], use_cache=True))
            keys, values = read_cache(loaded, cache, cut.context)
        leaves = _make_leaves(cache)
        gradients = _differentiate(loaded, ids[:, cut.context :], cache, leaves, seed)
    key_gradients, value_gradients = (
        torch.stack([gradient[0, :, cut.coded].float() for gradient in side]).permute(2, 0, 1, 3)
        for side in (gradients[0::2], gradients[1::2])
    )
    return SensitivityRows(
        keys[cut.coded].clone(),
        values[cut.coded].clone(),
        pull_back(loaded.rope, key_gradients, torch.arange(cut.tokens)[cut.coded]).flatten(1),
        value_gradients.flatten(1),
    )


def pull_back(rope: RopeParameters, covectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn gradients with respect to cached keys into gradients with respect to keys before RoPE.

    A cached key is ``s R k`` with a rotation ``R`` and the attention scaling ``s`` (1 unless YaRN), so
    the chain rule multiplies a gradient by ``s R^T``. Removing RoPE as from a key would divide by ``s``.

    Parameters
    ----------
    rope : RopeParameters
        How the keys are rotated.
    covectors : torch.Tensor
        ``[tokens, ..., head_size]``: gradients, or queries, which keys meet in the same way.
    positions : torch.Tensor
        Integer ``[tokens]``: where the keys are.

    Returns
    -------
    torch.Tensor
        float32, of the shape of `covectors`.

    Raises
    ------
    RopeError
        If `positions` do not fit `covectors`.
    """
    cos, sin = rope.cos_sin(positions)
    return rope.rotate(covectors, cos, -sin)


def _make_leaves(cache: Any) -> list[torch.Tensor]:
    """Make keys and values of every layer, in turn, variables that gradients are taken for."""
    leaves = []
    for layer in cache.layers:
        layer.keys = layer.keys.detach().requires_grad_()
        layer.values = layer.values.detach().requires_grad_()
        leaves += [layer.keys, layer.values]
    return leaves


def _differentiate(
    loaded: LoadedModel, scored_ids: torch.Tensor, cache: Any, leaves: list[torch.Tensor], seed: int
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the log-likelihood of sampled labels with respect to the leaves."""
    name, dtype = type(loaded.model).__name__, loaded.geometry.dtype
    try:
        with torch.enable_grad():
            given = cache_argument(loaded.model, cache)
            logits = loaded.model(input_ids=scored_ids, use_cache=True, **given).logits[0]
            log_probabilities = logits.float().log_softmax(-1)
            if log_probabilities.isnan().any():  # as infinite logits give, too
                raise CalibrationError(
                    f"the model's predictions in {dtype} hold NaN or infinity; load it in float32"
                )
            labels = torch.multinomial(
                log_probabilities.detach().exp(), 1, generator=torch.Generator().manual_seed(seed)
            )
            likelihood = log_probabilities.gather(1, labels).sum()
            gradients = torch.autograd.grad(likelihood, leaves)
    except RuntimeError as error:
        raise CalibrationError(
            f"no gradients come back through the cache of {name}: {error}; use forward-only sensitivity"
        ) from error
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise CalibrationError(f"the gradients of {name} in {dtype} hold NaN or infinity; load it in float32")
    return gradients


@contextmanager
def _frozen_parameters(model: Any) -> Iterator[None]:
    """Spare the graph what only the parameters' own gradients would need."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
