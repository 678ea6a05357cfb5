"""The settings of tiers, by kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from dynamo_kvtc.config.sections import (
    ConfigPath,
    Divergence,
    Ratio,
    Section,
    check_one_plan,
    null_is_empty,
)
from dynamo_kvtc.config.units import Duration, Size

__all__ = [
    "DiskTierConfig",
    "EncryptionConfig",
    "EncryptionKeyConfig",
    "HostTierConfig",
    "ObjectTierConfig",
    "TierCodecConfig",
    "TierConfig",
    "check_tiers",
]


class TierCodecConfig(Section):
    """With which plan blocks are encoded on their way into a tier, where that differs from `codec`."""

    ratio: Ratio | None = None
    """As codec.ratio."""

    max_kl: Divergence | None = None
    """As codec.max_kl."""

    @model_validator(mode="after")
    def _one_plan(self) -> TierCodecConfig:
        check_one_plan(self.ratio, self.max_kl)
        return self

    @property
    def is_set(self) -> bool:
        """Whether anything is set."""
        return self.ratio is not None or self.max_kl is not None


_TierCodec = Annotated[TierCodecConfig, BeforeValidator(null_is_empty)]


class EncryptionKeyConfig(Section):
    """A master key."""

    id: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
    """Name of the key, for people; objects name it by an id that follows from its content."""

    file: ConfigPath
    """File with 32 random bytes, as they are, in hexadecimal or in base64; such as a mounted Secret. Refused
    where others than its owner may write it, warned of where anybody may read it."""


class EncryptionConfig(Section):
    """AES-256-GCM for a tier's objects, with a key of its own for every tenant and object."""

    keys: Annotated[list[EncryptionKeyConfig], Field(min_length=1, max_length=8)]
    """The first key encrypts, all of them decrypt: to rotate, put a new one in front, and remove the old one
    when its objects have aged out."""


class HostTierConfig(Section):
    """Host memory (G2): fast, and gone when the process ends."""

    kind: Literal["host"]
    """Chooses this kind of tier."""

    capacity: Annotated[Size, Field(gt=0)]
    """Bytes of memory for stored objects, headers included; pages are taken as they are first written."""

    codec: _TierCodec = TierCodecConfig()
    """The plan to encode with, if this is the first tier; if it is empty, codec's counts."""

    encryption: EncryptionConfig | None = None
    """Encrypts the tier's objects; null: they are kept as they are. Needs the extra encryption."""


class DiskTierConfig(Section):
    """A folder on a local disk (G3); survives restarts."""

    kind: Literal["disk"]
    """Chooses this kind of tier."""

    path: ConfigPath
    """Folder of the tier's segment files; made if it is missing."""

    capacity: Annotated[Size, Field(gt=0)]
    """Bytes that the folder may take; the least recently used objects go first."""

    segment_size: Annotated[Size, Field(ge=1024**2)] = 256 * 1024**2
    """Bytes of one segment file; larger ones are used where the capacity would need more than 128."""

    shared: bool = False
    """Whether several workers of one machine use the folder, each reading what all of them wrote. Capacity is
    then that of each worker's own objects. All of them must say so; a second process is refused without
    it."""

    admit_after: Annotated[int, Field(ge=0, le=15)] = 0
    """In how many lookups a tier block must have been asked for before it is written; 0 writes all. Below the
    first tier only."""

    daily_writes: Annotated[Size, Field(gt=0)] | None = None
    """Bytes that may be written a day, to spare the disk; null: any number. Below the first tier only."""

    durability: Literal["none", "fsync"] = "none"
    """none: objects survive the process; after a power cut recent ones may be missing, or damaged and
    found out by their checksums. fsync: what was stored survives a power cut."""

    codec: _TierCodec = TierCodecConfig()
    """The plan to encode with, if this is the first tier; if it is empty, codec's counts."""

    encryption: EncryptionConfig | None = None
    """Encrypts the tier's objects; null: they are kept as they are. Needs the extra encryption."""


class ObjectTierConfig(Section):
    """A prefix of an S3 bucket (G4), shared by any number of workers unless it has a capacity. Credentials
    come from the environment or the shared credentials file, as usual for S3.
    """

    kind: Literal["object"]
    """Chooses this kind of tier."""

    bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
    """The bucket; it must exist."""

    prefix: Annotated[str, Field(max_length=512, pattern=r"^[A-Za-z0-9._=/-]*$")] = ""
    """What every object's name begins with; a slash follows by itself."""

    endpoint: Annotated[str | None, Field(pattern=r"^https?://[^/?#@]+/?$")] = None
    """URL of the server, such as https://minio.storage.svc:9000; null: AWS. With http:// everything can be
    read on the network."""

    region: Annotated[str, Field(min_length=1, max_length=64)] = "us-east-1"
    """Region that requests are signed for."""

    virtual_hosted: bool = False
    """Whether the bucket is part of the host name; servers other than AWS mostly want it in the path."""

    capacity: Annotated[Size | None, Field(gt=0)] = None
    """Bytes that the prefix may take. Only where this process alone writes to it: the least recently used
    objects are deleted. null: shared, and the bucket's lifecycle rules expire objects."""

    request_timeout: Annotated[Duration, Field(gt=0)] = 10.0
    """Deadline of one request to the bucket."""

    lookup_wait: Annotated[Duration, Field(ge=0)] = 0.05
    """How long a lookup waits for the bucket's answer about keys that this process does not know; later
    answers serve the next lookup. 0s: not at all."""

    miss_ttl: Annotated[Duration, Field(ge=0)] = 5.0
    """How long a key that the bucket did not have is not asked for again."""

    max_requests: Annotated[int, Field(ge=1, le=1024)] = 32
    """Requests in flight; further ones wait, within their deadlines."""

    uploads: Annotated[int, Field(ge=1, le=256)] = 8
    """Objects uploaded at once: of those that a faster tier has taken already; where offloads wait for the
    bucket, of a batch (pipeline.offload_batch)."""

    upload_queue: Annotated[Size, Field(ge=0)] = 64 * 1024**2
    """Bytes of memory for objects that wait to be uploaded or are under way; what does not fit is not
    uploaded. 0: none; offloads wait for the bucket."""

    transport: Literal["auto", "nixl", "client"] = "auto"
    """nixl: read over NIXL's OBJ backend; client: over the asynchronous client; auto: NIXL's where it
    loads."""

    codec: _TierCodec = TierCodecConfig()
    """The plan to encode with, if this is the first tier; if it is empty, codec's counts."""

    encryption: EncryptionConfig | None = None
    """Encrypts the tier's objects; null: they are kept as they are. Needs the extra encryption."""


TierConfig = Annotated[HostTierConfig | DiskTierConfig | ObjectTierConfig, Field(discriminator="kind")]


def check_tiers(tiers: list[TierConfig]) -> list[TierConfig]:
    """Refuse, with a `ValueError`, orders and places that contradict each other."""
    kinds = [tier.kind for tier in tiers]
    if kinds.count("host") > 1:
        raise ValueError("there can be one host tier; give it the sum of the capacities")
    if "host" in kinds[1:]:
        raise ValueError("tiers are listed from fast to slow: the host tier comes first")
    if "object" in kinds[:-1]:
        raise ValueError(
            "tiers are listed from fast to slow: the object tier comes last, and there can be one"
        )
    if any(tier.codec.is_set for tier in tiers[1:]):
        raise ValueError(
            "blocks are encoded once, on their way into the first tier, and tiers below take its bytes: put "
            "codec into the first tier's entry"
        )
    places = [tier.path.resolve() for tier in tiers if isinstance(tier, DiskTierConfig)]
    for index, place in enumerate(places):
        for other in places[:index]:
            if place == other or place in other.parents or other in place.parents:
                raise ValueError(f"two disk tiers cannot share a folder: {other} and {place}")
    return tiers
