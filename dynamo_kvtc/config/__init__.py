"""One YAML file to validated, typed settings.

Owns: the file's keys, their units, defaults and descriptions, environment overrides, the JSON schema.
Does not own: what a setting does; the room that reads it does.
"""

from dynamo_kvtc.config.load import ENV_PREFIX, Problem, check_config, load_config
from dynamo_kvtc.config.models import (
    CodecConfig,
    Config,
    DiskTierConfig,
    EncryptionConfig,
    HostTierConfig,
    ObjectTierConfig,
    ObservabilityConfig,
    PipelineConfig,
    PolicyConfig,
    SecurityConfig,
    TierConfig,
    TransferConfig,
    json_schema,
)

__all__ = [
    "ENV_PREFIX",
    "CodecConfig",
    "Config",
    "DiskTierConfig",
    "EncryptionConfig",
    "HostTierConfig",
    "ObjectTierConfig",
    "ObservabilityConfig",
    "PipelineConfig",
    "PolicyConfig",
    "Problem",
    "SecurityConfig",
    "TierConfig",
    "TransferConfig",
    "check_config",
    "json_schema",
    "load_config",
]
