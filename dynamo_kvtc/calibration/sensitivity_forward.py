"""Estimate what predictions feel of cached keys and values without a backward pass.

For models whose gradients do not fit into memory. Errors are followed to first order from the cache to
the residual stream, and no further. A scored token ``i`` reads a context token ``j`` in one query head as
``o_i = sum_j a_ij v_j`` with ``a_ij = softmax_j(c q_i . R_j k_j)``, scaling ``c``, and adds ``W o_i`` to
its residual stream, which is ``x_i`` behind it. Errors of ``j`` then change the stream by

    values:  a_ij W dv
    keys:    a_ij c (R_j^T q_i . dk) W (v_j - o_i)

whose squared lengths are quadratic forms of ``dv`` and ``dk``. The stream is normalised before anything
reads it, so they count relative to ``|x_i|^2``, which makes keys and values, heads and layers
commensurable:

    values:  sum_i a_ij^2 / |x_i|^2  W^T W
    keys:    sum_i a_ij^2 / |x_i|^2  c^2 |W (v_j - o_i)|^2  (R_j^T q_i) (R_j^T q_i)^T

summed over the query heads that share a KV head, whose errors are taken as independent, and averaged over
coded tokens ``j``. This stands in for the Fisher blocks of `dynamo_kvtc.calibration.sensitivity_capture`
up to one factor: it ranks errors, and says nothing of their size in nats. What later layers do with an error
is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dynamo_kvtc.calibration.capture import read_cache
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.sensitivity_capture import DocumentCut, pull_back
from dynamo_kvtc.calibration.transformers_cache import cache_argument, cache_of
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import CalibrationError

__all__ = ["ForwardSensitivity", "ForwardSensitivitySums", "forward_only_sensitivity"]

#: Coded tokens whose moments of queries are in memory together.
_TOKENS_AT_ONCE = 128

#: Relative difference that rounding may leave between the model's figures and those of the formulas.
_AGREEMENT = {"bfloat16": 0.05, "float16": 0.01, "float32": 0.001}


@dataclass(frozen=True, eq=False)
class ForwardSensitivity:
    """What one document tells of every KV head.

    Attributes
    ----------
    key_blocks, value_blocks : torch.Tensor
        float32 ``[layers, kv_heads, head_size, head_size]``, symmetric and positive semi-definite: means
        over coded tokens, of keys before RoPE and of values.
    coded_tokens : int
        How many tokens they are means over.
    """

    key_blocks: torch.Tensor
    value_blocks: torch.Tensor
    coded_tokens: int


class ForwardSensitivitySums:
    """Means over the coded tokens of many documents, added one by one.

    Parameters
    ----------
    geometry : KvGeometry
        The model's.
    """

    def __init__(self, geometry: KvGeometry) -> None:
        shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_size, geometry.head_size)
        self._keys = torch.zeros(shape, dtype=torch.float64)
        self._values = torch.zeros(shape, dtype=torch.float64)
        self.coded_tokens = 0

    def add(self, document: ForwardSensitivity) -> None:
        """Add a document.

        Raises
        ------
        CalibrationError
            If it is of a model of another geometry.
        """
        if document.key_blocks.shape != self._keys.shape:
            raise CalibrationError(
                f"blocks of shape {tuple(document.key_blocks.shape)} do not belong to a model with blocks of "
                f"shape {tuple(self._keys.shape)}; add documents of one model only"
            )
        self._keys.add_(document.key_blocks, alpha=document.coded_tokens)
        self._values.add_(document.value_blocks, alpha=document.coded_tokens)
        self.coded_tokens += document.coded_tokens

    @property
    def key_blocks(self) -> torch.Tensor:
        """float32 ``[layers, kv_heads, head_size, head_size]``; CalibrationError before any document."""
        return self._mean(self._keys)

    @property
    def value_blocks(self) -> torch.Tensor:
        """float32 ``[layers, kv_heads, head_size, head_size]``; CalibrationError before any document."""
        return self._mean(self._values)

    def _mean(self, sums: torch.Tensor) -> torch.Tensor:
        if not self.coded_tokens:
            raise CalibrationError("there is no sensitivity without a document; add at least one")
        return (sums / self.coded_tokens).float()


@torch.inference_mode()
def forward_only_sensitivity(
    loaded: LoadedModel, token_ids: Sequence[int], *, scored_tokens: int, recent_window: int
) -> ForwardSensitivity:
    """Estimate the Fisher blocks of a document's keys and values from two forward passes.

    The document is cut as by `dynamo_kvtc.calibration.sensitivity_capture.capture_sensitivity`. Besides
    the passes it costs ``2 * layers * query heads * scored * coded * head_size**2`` operations, since every
    query is turned into the frame of every coded key; memory holds one layer's attention, a few times
    ``4 * query heads * scored * tokens`` bytes. Where either is too much, score fewer tokens.

    Attention is computed once more from the cache and from what forward hooks see at ``q_proj`` (or
    ``q_norm``), ``o_proj`` and ``post_attention_layernorm``, as Llama, Mistral, Qwen2 and Qwen3 have them
    in transformers, and compared with the model's own; where it differs, the formulas do not hold and the
    model is refused.

    Parameters
    ----------
    loaded : LoadedModel
        The model.
    token_ids : Sequence[int]
        One document.
    scored_tokens : int
        Tokens at the end whose attention is followed; the rest is context.
    recent_window : int
        Tokens at the end of the context that compression leaves alone.

    Returns
    -------
    ForwardSensitivity
        Of the positions `SINK_TOKENS` to ``len(token_ids) - scored_tokens - recent_window - 1``.

    Raises
    ------
    CalibrationError
        If the document is too short, the model's attention is of another kind, or something in it is NaN
        or infinite.
    """
    cut = DocumentCut(len(token_ids), scored_tokens, recent_window)
    layers = _known_layers(loaded)
    ids = torch.tensor([list(token_ids)])
    decoder = loaded.model.base_model
    cache = cache_of(decoder(input_ids=ids[:, : cut.context], use_cache=True))
    with _watched(layers) as seen:
        streams = decoder(
            input_ids=ids[:, cut.context :],
            **cache_argument(decoder, cache),
            use_cache=True,
            output_hidden_states=True,
        ).hidden_states
    read_cache(loaded, cache, cut.tokens)  # for its checks
    blocks = []
    for layer, notes, cached, stream in zip(layers, seen, cache.layers, streams, strict=False):
        _check_agreement(loaded, stream[0] + notes.added, notes.stream, "the residual stream behind it")
        blocks.append(_layer_blocks(loaded, cut, layer.self_attn, notes, cached))
    keys, values = (torch.stack(side) for side in zip(*blocks, strict=True))
    return ForwardSensitivity(keys, values, cut.stop - cut.coded.start)


class _Notes:
    """What the scored tokens did in one layer, each ``[scored, channels]`` in the model's dtype.

    `queries` before RoPE, the heads' `outputs`, what they `added` to the residual stream, and the `stream`
    behind it.
    """

    queries: torch.Tensor
    outputs: torch.Tensor
    added: torch.Tensor
    stream: torch.Tensor

    def note_queries(self, module: Any, given: Any, output: torch.Tensor) -> None:
        self.queries = output[0]

    def note_outputs(self, module: Any, given: Any, output: torch.Tensor) -> None:
        self.outputs, self.added = given[0][0], output[0]

    def note_stream(self, module: Any, given: Any) -> None:
        self.stream = given[0][0]


def _known_layers(loaded: LoadedModel) -> list[Any]:
    """Return the decoder layers, if all have the parts that the formulas need."""
    geometry = loaded.geometry
    try:
        layers = list(loaded.model.base_model.layers)
        plain = all(
            isinstance(layer.self_attn.q_proj, torch.nn.Linear)
            and isinstance(layer.self_attn.o_proj, torch.nn.Linear)
            and layer.self_attn.q_proj.out_features == layer.self_attn.o_proj.in_features
            and layer.self_attn.o_proj.in_features % geometry.layer_size == 0
            and layer.self_attn.scaling > 0
            and isinstance(layer.post_attention_layernorm, torch.nn.Module)
            for layer in layers
        )
    except AttributeError as error:
        raise _unknown_attention(loaded, str(error)) from error
    if not plain or len(layers) != geometry.num_layers:
        raise _unknown_attention(loaded, "its query and output projections are not plain linear layers")
    return layers


def _unknown_attention(loaded: LoadedModel, why: str) -> CalibrationError:
    return CalibrationError(
        f"forward-only sensitivity does not know the attention of {type(loaded.model).__name__}: {why}; "
        "capture gradients instead"
    )


@contextmanager
def _watched(layers: list[Any]) -> Iterator[list[_Notes]]:
    """Take notes in every layer."""
    seen = [_Notes() for _ in layers]
    hooks = []
    for notes, layer in zip(seen, layers, strict=True):
        attention = layer.self_attn
        queries = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
        hooks += [
            queries.register_forward_hook(notes.note_queries),
            attention.o_proj.register_forward_hook(notes.note_outputs),
            layer.post_attention_layernorm.register_forward_pre_hook(notes.note_stream),
        ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _layer_blocks(
    loaded: LoadedModel, cut: DocumentCut, attention: Any, notes: _Notes, cached: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key and value blocks of one layer, float32 ``[kv_heads, head_size, head_size]`` each."""
    heads, size = loaded.geometry.num_kv_heads, loaded.geometry.head_size
    positions = torch.arange(cut.tokens)
    rotated = loaded.rope.apply_rope(
        notes.queries.reshape(cut.scored_tokens, -1, size), positions[cut.context :]
    )
    rotated = rotated.transpose(0, 1).reshape(heads, -1, cut.scored_tokens, size)
    keys, values = cached.keys[0].float(), cached.values[0].float()
    unseen = positions[None, :] > positions[cut.context :, None]
    logits = rotated @ keys[:, None].transpose(2, 3) * attention.scaling
    weights = logits.masked_fill_(unseen, -torch.inf).softmax(-1)
    read = weights @ values[:, None]  # [kv_heads, query heads of each, scored, head_size]
    expected = notes.outputs.reshape(cut.scored_tokens, heads, -1, size).permute(1, 2, 0, 3)
    _check_agreement(loaded, read, expected, "what its heads read")

    projection = attention.o_proj.weight.float()
    projection = projection.view(len(projection), heads, -1, size).permute(1, 2, 0, 3)
    metric = projection.transpose(2, 3) @ projection  # W^T W by head
    coded = values[:, None, cut.coded]
    # a^2 / |x|^2: how much each scored token feels of each coded one
    felt = weights[..., cut.coded].square_() / notes.stream.float().square().sum(1)[:, None]
    change = _squared_distances(read, coded, metric)  # |W (v_j - o_i)|^2
    value_blocks = (felt.sum((2, 3))[..., None, None] * metric).sum(1)
    key_weights = felt.mul_(change).mul_(attention.scaling**2)
    key_blocks = torch.stack(
        [
            _query_moments(
                loaded.rope, head_queries.flatten(0, 1), head_weights.flatten(0, 1), positions[cut.coded]
            )
            for head_queries, head_weights in zip(rotated, key_weights, strict=True)
        ]
    )
    blocks = torch.stack([key_blocks, value_blocks]) / coded.shape[2]
    keys_mean, values_mean = (blocks + blocks.transpose(2, 3)) / 2
    return keys_mean, values_mean


def _check_agreement(loaded: LoadedModel, ours: torch.Tensor, models: torch.Tensor, what: str) -> None:
    """Refuse a model whose own figures are not those of the formulas."""
    dtype = loaded.geometry.dtype
    if not models.isfinite().all():
        raise CalibrationError(f"the model's attention in {dtype} holds NaN or infinity; load it in float32")
    size = float(models.float().norm())
    difference = float((ours.float() - models.float()).norm())
    if not difference <= _AGREEMENT[dtype] * size:  # written so that NaN is refused, too
        share = f" by {difference / size:.1%}" if size else ""
        raise _unknown_attention(loaded, f"{what} differs{share} from softmax attention")


def _squared_distances(left: torch.Tensor, right: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Return ``(r - l)^T M (r - l)`` for all rows l and r: ``[..., rows of left, rows of right]``."""
    seen_left = left @ metric
    cross = seen_left @ right.transpose(-1, -2)
    own_left = (seen_left * left).sum(-1)[..., :, None]
    own_right = ((right @ metric) * right).sum(-1)[..., None, :]
    return (own_left + own_right - 2 * cross).clamp_(min=0)


def _query_moments(
    rope: RopeParameters, queries: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return the weighted second moment of queries, each in the frame of each key before RoPE.

    `queries` after RoPE ``[n, head_size]``, `weights` ``[n, keys]``, `positions` of the keys ``[keys]``;
    result ``[head_size, head_size]``. The moments are summed over queries first and turned after it,
    which turns a matrix for each key instead of a query for each pair.
    """
    size = queries.shape[1]
    products = (queries[:, :, None] * queries[:, None, :]).flatten(1)
    total = queries.new_zeros(size, size)
    for first in range(0, positions.numel(), _TOKENS_AT_ONCE):
        part = slice(first, first + _TOKENS_AT_ONCE)
        moments = (weights[:, part].T @ products).view(-1, size, size)
        half_turned = pull_back(rope, moments, positions[part]).transpose(1, 2)
        total += pull_back(rope, half_turned, positions[part]).sum(0)
    return total
