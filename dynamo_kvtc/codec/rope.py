"""Rotary position embeddings: described, removed from keys and put back.

Keys are rotated by their position before they enter the cache, which smears the few directions that
keys really use over many; KVTC undoes the rotation before projecting (KVTC, section 3.1). Frequencies
are defined as in transformers' ``modeling_rope_utils`` and computed in float64.

Attention scaling (YaRN) multiplies cosine and sine by a factor, so a rotated pair grows by it, and the
inverse divides by ``cos**2 + sin**2``, which is the factor's square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from dynamo_kvtc.errors import RopeError

__all__ = ["SCALINGS", "STYLES", "RopeParameters"]

#: How rotated pairs lie in a head: "half" pairs channel i with i + rotary_dim / 2 (GPT-NeoX, Llama),
#: "interleaved" pairs channel 2i with 2i + 1 (GPT-J, Cohere, GLM).
STYLES = ("half", "interleaved")

#: Frequency scalings that can be removed and put back: all that do not depend on the sequence's length.
SCALINGS = ("default", "linear", "llama3", "yarn")

#: Architectures of transformers whose attention rotates interleaved pairs.
_INTERLEAVED_MODELS = frozenset({"cohere", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium"})

#: Architectures of transformers that leave the keys of some of their layers unrotated.
_PARTLY_ROTATED_MODELS = frozenset({"cohere2", "cohere2_moe", "exaone4", "llama4", "llama4_text", "smollm3"})

#: Beyond every parameter of every model; what is larger comes from a damaged or forged file.
_LARGEST = 1e15


@dataclass(frozen=True)
class RopeParameters:
    """How the keys of a model are rotated, the same in every layer.

    Attributes
    ----------
    theta : float
        Base of the frequencies.
    rotary_dim : int
        Leading channels of each head that are rotated; even. The channels behind them pass through.
    style : str
        One of `STYLES`.
    scaling : str
        One of `SCALINGS`.
    factor : float
        Context extension factor; "linear", "llama3" and "yarn".
    low_freq_factor, high_freq_factor : float
        Bounds of the interpolated wavelengths; "llama3".
    original_max_position_embeddings : int
        Context length before extension, in tokens; "llama3" and "yarn".
    beta_fast, beta_slow : float
        Rotations over the original context beyond which a frequency is kept, and below which it is
        interpolated; "yarn".
    attention_factor : float or None
        Factor on cosine and sine; None derives it from `factor`, `mscale` and `mscale_all_dim`; "yarn".
    mscale, mscale_all_dim : float or None
        Used together to derive the attention factor; "yarn".
    truncate : bool
        Round the interpolated range to whole channels; "yarn".

    Raises
    ------
    RopeError
        If a field is out of range or a scaling lacks what it needs.
    """

    theta: float
    rotary_dim: int
    style: str = "half"
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.theta) and self.theta > 1):
            raise RopeError(f"RoPE theta must be a number above 1, not {self.theta}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise RopeError(f"RoPE rotates an even number of channels, not {self.rotary_dim}")
        if self.style not in STYLES:
            raise RopeError(f"unknown RoPE style {self.style!r}; supported: {', '.join(STYLES)}")
        if self.scaling not in SCALINGS:
            raise RopeError(f"unsupported RoPE scaling {self.scaling!r}; supported: {', '.join(SCALINGS)}")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise RopeError(f"RoPE scaling factor must be positive, not {self.factor}")
        if self.scaling in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise RopeError(f"RoPE scaling {self.scaling!r} needs original_max_position_embeddings")
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise RopeError("RoPE scaling 'llama3' needs 0 < low_freq_factor < high_freq_factor")
        if self.scaling == "yarn" and min(self.beta_fast, self.beta_slow) <= 0:
            raise RopeError("RoPE scaling 'yarn' needs positive beta_fast and beta_slow")
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise RopeError(f"RoPE attention factor must be positive, not {self.attention_factor}")

    # --- construction ----------------------------------------------------------------------------

    @classmethod
    def from_hf_config(cls, config: Any) -> RopeParameters:
        """Read the rotary embedding from a Hugging Face model configuration.

        Parameters
        ----------
        config : Mapping or transformers.PreTrainedConfig
            A parsed ``config.json`` or a configuration object, with the spelling of transformers 4
            (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``). Of a multimodal model, give the
            text configuration.

        Raises
        ------
        RopeError
            If the model has no rotary embedding, or one that the codec cannot remove.
        """
        settings: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        rope = _rope_settings(settings)
        _refuse_unsupported(settings, rope)

        theta = _first(rope.get("rope_theta"), settings.get("rope_theta"), settings.get("rotary_emb_base"))
        if theta is None:
            raise RopeError("the model's configuration names no rope_theta: its keys are not rotated by RoPE")
        head_size = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
        share = _first(
            rope.get("partial_rotary_factor"),
            settings.get("partial_rotary_factor"),
            settings.get("rotary_pct"),
            1.0,
        )
        original = _first(
            settings.get("original_max_position_embeddings"),
            rope.get("original_max_position_embeddings"),
            settings.get("max_position_embeddings"),
            0,
        )
        factor = rope.get("factor")
        if factor is None:
            factor = settings["max_position_embeddings"] / original if rope["rope_type"] == "yarn" else 1.0
        optional = {
            name: rope[name]
            for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
            if rope.get(name) is not None
        }
        return cls(
            theta=float(theta),
            rotary_dim=int(head_size * share),
            style="interleaved" if settings.get("model_type") in _INTERLEAVED_MODELS else "half",
            scaling=rope["rope_type"],
            factor=float(factor),
            original_max_position_embeddings=int(original) if rope["rope_type"] in ("llama3", "yarn") else 0,
            attention_factor=rope.get("attention_factor"),
            mscale=rope.get("mscale"),
            mscale_all_dim=rope.get("mscale_all_dim"),
            truncate=bool(rope.get("truncate", True)),
            **{name: float(value) for name, value in optional.items()},
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RopeParameters:
        """Rebuild from `to_dict`'s result.

        Raises
        ------
        RopeError
            If a key is unknown or missing, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise RopeError(
                f"unknown RoPE parameters {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        for name, value in data.items():
            _check_type(name, value)
        try:
            return cls(**data)
        except TypeError as error:
            raise RopeError(f"RoPE parameters are incomplete or of a wrong type: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return asdict(self)

    # --- frequencies -----------------------------------------------------------------------------

    def inv_freq(self) -> torch.Tensor:
        """Return the angle per position of each rotated pair, in radians: float64 ``[rotary_dim / 2]``."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        frequencies = self.theta**-exponents
        if self.scaling == "linear":
            return frequencies / self.factor
        if self.scaling == "llama3":
            return frequencies * self._llama3_scale(frequencies)
        if self.scaling == "yarn":
            return frequencies * self._yarn_scale()
        return frequencies

    def attention_scaling(self) -> float:
        """Return the factor on cosine and sine; 1 unless the scaling is "yarn" (YaRN, equation 22)."""
        if self.scaling != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:
            return self._log_scale(self.mscale) / self._log_scale(self.mscale_all_dim)
        return self._log_scale(1.0)

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scaled cosines and sines, one column per rotated pair.

        Parameters
        ----------
        positions : torch.Tensor
            Integer ``[tokens]``.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            float32 ``[tokens, rotary_dim / 2]`` each; angles are computed in float64.
        """
        angles = positions.to(torch.float64)[:, None] * self.inv_freq()[None, :]
        scale = self.attention_scaling()
        return (angles.cos() * scale).float(), (angles.sin() * scale).float()

    def _llama3_scale(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Keep short wavelengths, divide long ones by the factor, blend between (Llama 3.1)."""
        rotations = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        blend = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) / self.factor + blend

    def _yarn_scale(self) -> torch.Tensor:
        """Blend interpolated and kept frequencies over a ramp of channels (YaRN, section 3.2)."""

        def channel(rotations: float) -> float:
            wavelength = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return self.rotary_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001  # as transformers and YaRN's authors do, to keep the ramp finite
        ramp = (torch.arange(self.rotary_dim // 2, dtype=torch.float64) - low) / (high - low)
        ramp = ramp.clamp(0, 1)
        return ramp / self.factor + (1 - ramp)

    def _log_scale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    # --- rotation --------------------------------------------------------------------------------

    def apply_rope(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate keys.

        Parameters
        ----------
        keys : torch.Tensor
            ``[tokens, ..., head_size]``, any floating dtype.
        positions : torch.Tensor
            Integer ``[tokens]``.

        Returns
        -------
        torch.Tensor
            float32, of the shape of `keys`.

        Raises
        ------
        RopeError
            If `positions` do not fit `keys` or the heads are smaller than `rotary_dim`.
        """
        cos, sin = self.cos_sin(positions)
        return self.rotate(keys, cos, sin)

    def remove_rope(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Undo `apply_rope`; parameters, result and errors as there."""
        cos, sin = self.cos_sin(positions)
        return self.rotate(keys, *self.inverse(cos, sin))

    @staticmethod
    def inverse(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines, of the same shape, whose rotation undoes that of `cos` and `sin`.

        Both are divided by ``cos² + sin²``: with YaRN's attention factor a rotation also scales.
        """
        squares = cos.square() + sin.square()
        return cos / squares, -sin / squares

    def rotate(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate keys by given cosines and sines (see `cos_sin`), for callers that reuse them.

        Shapes, result and errors are those of `apply_rope`.
        """
        if keys.ndim < 2 or cos.shape[0] != keys.shape[0]:
            raise RopeError(f"{cos.shape[0]} positions do not fit keys of shape {tuple(keys.shape)}")
        if keys.shape[-1] < self.rotary_dim:
            raise RopeError(
                f"heads of {keys.shape[-1]} channels cannot have {self.rotary_dim} of them rotated"
            )
        shape = (keys.shape[0],) + (1,) * (keys.ndim - 2) + (self.rotary_dim // 2,)
        cos, sin = cos.view(shape), sin.view(shape)
        source = keys.float()
        result = torch.empty_like(source)
        x, y = self._pairs(source)
        out_x, out_y = self._pairs(result)
        torch.mul(x, cos, out=out_x).addcmul_(y, sin, value=-1)
        torch.mul(y, cos, out=out_y).addcmul_(x, sin)
        result[..., self.rotary_dim :] = source[..., self.rotary_dim :]
        return result

    def _pairs(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first and second members of all rotated pairs."""
        if self.style == "half":
            half = self.rotary_dim // 2
            return keys[..., :half], keys[..., half : self.rotary_dim]
        return keys[..., 0 : self.rotary_dim : 2], keys[..., 1 : self.rotary_dim : 2]


def _check_type(name: str, value: object) -> None:
    """Refuse a value that was read from a file and is no word, truth value or number of a sane size."""
    if name in ("style", "scaling"):
        sound = isinstance(value, str)
    elif name == "truncate":
        sound = isinstance(value, bool)
    elif name in ("rotary_dim", "original_max_position_embeddings"):
        sound = type(value) is int and abs(value) <= _LARGEST
    else:
        optional = value is None and name in ("attention_factor", "mscale", "mscale_all_dim")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
        sound = optional or is_number
    if not sound:
        raise RopeError(f"RoPE parameter {name} cannot be {str(value)[:40]!r}")


def _first(*candidates: Any) -> Any:
    """Return the first candidate that is not None."""
    return next((candidate for candidate in candidates if candidate is not None), None)


def _rope_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the spellings of transformers 4 and 5 into one dict with a ``rope_type``."""
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def _refuse_unsupported(settings: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Raise RopeError for every rotary embedding that one `RopeParameters` cannot describe."""
    model = settings.get("model_type", "this model")
    supported = f"supported: one rotation for all layers with scaling {', '.join(SCALINGS)}"
    per_layer_type = any(isinstance(value, Mapping) for value in rope.values())
    if per_layer_type or settings.get("rope_local_base_freq") is not None:
        raise RopeError(f"{model} rotates its layer types differently; {supported}")
    unrotated = settings.get("no_rope_layers")
    if model in _PARTLY_ROTATED_MODELS or (unrotated and not all(unrotated)):
        raise RopeError(f"{model} leaves the keys of some layers unrotated; {supported}")
    if rope.get("mrope_section") is not None or rope["rope_type"] == "mrope":
        raise RopeError(
            f"{model} uses multimodal RoPE, whose positions are not one number a token; {supported}"
        )
    if rope["rope_type"] not in SCALINGS:
        raise RopeError(f"{model} uses RoPE scaling {rope['rope_type']!r}; {supported}")
