"""The schema of ``artifact.json``: everything in an artifact that is not a tensor.

Every size is bounded here, before anything is allocated for it.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

__all__ = [
    "SCHEMA_VERSION",
    "CalibrationRecord",
    "ExpectedError",
    "GroupManifest",
    "HeadShard",
    "Manifest",
    "MeasuredManifest",
    "ModelManifest",
    "ParametersFile",
    "PlanManifest",
    "RatioManifest",
    "RdPlanManifest",
    "RdSideManifest",
    "SideManifest",
]

#: Version of the schema; it changes when an older reader could misread the artifact.
SCHEMA_VERSION: Literal[1] = 1

#: Elements of one row: more than any model has, few enough that a damaged file cannot exhaust memory.
_MAXIMUM_ROW = 1 << 20

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Ratio = Annotated[float, Field(gt=1, le=4096, allow_inf_nan=False)]
_PlanId = Annotated[int, Field(ge=0, le=255)]
_Dimension = Annotated[int, Field(ge=1, le=4096)]
_Components = Annotated[int, Field(ge=0, le=_MAXIMUM_ROW)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _leave_out_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that an artifact written before an optional part was invented keeps its content id.
        return {name: value for name, value in handler(self).items() if value is not None}


class HeadShard(_Strict):
    """Which of the model's KV heads the artifact covers."""

    first: _Count
    count: _Dimension
    total: _Dimension


class ModelManifest(_Strict):
    """Fingerprint of the calibrated model."""

    architecture: Annotated[str, Field(max_length=256)]
    num_layers: _Dimension
    num_kv_heads: _Dimension
    head_size: _Dimension
    dtype: Literal["bfloat16", "float16", "float32"]
    rope: dict[str, Any]
    weights_hash: _Hash


class CalibrationRecord(_Strict):
    """What the artifact was calibrated on and how.

    With the rd profile also: how many documents the sensitivity was taken from and how many tokens of
    each were scored, whether it came from gradients or from forward passes only, and how many documents
    the plans were measured on. The share of generated recall documents stands there if there were any.
    """

    text_digest: _Hash
    input_digest: _Hash
    documents: _Count
    document_tokens: _Count
    rows: _Count
    sample_rows: _Count
    sink_tokens: _Count
    recent_window: _Count
    method: Literal["eigh", "randomised"]
    seed: int
    sensitivity_documents: _Count | None = None
    scored_tokens: _Count | None = None
    validation_documents: _Count | None = None
    sensitivity: Literal["gradients", "forward"] | None = None
    recall_share: Annotated[float, Field(gt=0, le=1)] | None = None


class MeasuredManifest(_Strict):
    """What a plan does to documents that took no part in the fit, by real streams."""

    ratio: Annotated[float, Field(gt=0, le=4096, allow_inf_nan=False)]
    kl: _Share
    top1: Annotated[float, Field(ge=0, le=1)]
    tokens: _Count | None = None


class RatioManifest(_Strict):
    """A nominal ratio, the id of its plans, and what was measured with them (rd only)."""

    plan_id: _PlanId
    ratio: _Ratio
    measured: MeasuredManifest | None = None


class PlanManifest(_Strict):
    """The bit plan of one side of one layer group."""

    plan_id: _PlanId
    bits_per_token: _Count
    groups: Annotated[
        list[tuple[_Count, _Dimension, Literal["int2", "int4", "fp8"]]], Field(max_length=_MAXIMUM_ROW)
    ]


class RdPlanManifest(_Strict):
    """What `dynamo_kvtc.codec.rd_plan.RdPlan` holds besides tensors.

    `counts` gives the components of each symbol class; their sum is the length of the plan's tensors.
    """

    plan_id: _PlanId
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    counts: tuple[_Components, _Components, _Components, _Components]


class _Side(_Strict):
    rank: _Components
    total_variance: _Share
    explained_variance: _Share


class SideManifest(_Side):
    """Keys or values of one layer group, profile kvtc.

    `rank` counts the stored components, `total_variance` the variance of all, stored or not, per token.
    """

    plans: Annotated[list[PlanManifest], Field(min_length=1, max_length=256)]


class RdSideManifest(_Side):
    """Keys or values of one layer group, profile rd; variances are those in the metric's space."""

    importance_bias: _Finite
    plans: Annotated[list[RdPlanManifest], Field(min_length=1, max_length=256)]


class GroupManifest(_Strict):
    """One layer group; both sides are of the artifact's profile."""

    first_layer: _Count
    num_layers: _Dimension
    keys: SideManifest | RdSideManifest
    values: SideManifest | RdSideManifest


class ExpectedError(_Strict):
    """Relative squared error of centred keys and values, per layer, at one nominal ratio.

    Measured on the calibration sample: the squared error of decoded rows over their variance.
    """

    plan_id: _PlanId
    keys: list[_Share]
    values: list[_Share]


class ParametersFile(_Strict):
    """The tensors' file; its hash stands for them in the artifact's id."""

    name: Literal["parameters.safetensors"] = "parameters.safetensors"
    size: _Count
    blake2b: _Hash
    basis_dtype: Literal["float16", "bfloat16", "float32"]


class Manifest(_Strict):
    """The whole of ``artifact.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: _Hash
    profile: Literal["kvtc", "rd"] = "kvtc"
    tool_version: Annotated[str, Field(max_length=64)]
    model: ModelManifest
    head_shard: HeadShard
    calibration: CalibrationRecord
    ratios: Annotated[list[RatioManifest], Field(min_length=1, max_length=256)]
    groups: Annotated[list[GroupManifest], Field(min_length=1, max_length=4096)]
    expected_error: list[ExpectedError]
    parameters: ParametersFile

    @model_validator(mode="after")
    def _parts_are_of_the_profile(self) -> Manifest:
        expected = RdSideManifest if self.profile == "rd" else SideManifest
        sides = [side for group in self.groups for side in (group.keys, group.values)]
        if not all(isinstance(side, expected) for side in sides):
            raise ValueError(f"the layer groups are not those of profile {self.profile}")
        if self.profile == "rd" and not all(entry.measured for entry in self.ratios):
            raise ValueError("with profile rd every plan has been measured")
        return self

    def content_id(self) -> str:
        """Return the hex BLAKE2b-256 over the canonical JSON of everything but the id.

        Canonical: UTF-8, keys sorted, no white space, floats as Python's `repr` writes them.
        """
        content = self.model_dump(mode="json", exclude={"id"})
        canonical = json.dumps(
            content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return blake2b(canonical.encode(), digest_size=32).hexdigest()
