from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynamo_kvtc.adapters.kvbm.settings import KvbmSettings, memory_limit, reconcile
from dynamo_kvtc.config import Config
from dynamo_kvtc.errors import ConfigError

GIB = 1024**3


def config(*tiers: dict[str, Any]) -> Config:
    return Config.model_validate({"codec": {"profile": "raw"}, "tiers": list(tiers)})


HOST = {"kind": "host", "capacity": "4GiB"}
DISK = {"kind": "disk", "path": "/var/lib/kvtc", "capacity": "100GiB"}


@pytest.mark.parametrize(
    "environment",
    [
        {"DYN_KVBM_CPU_CACHE_GB": "10"},
        {"DYN_KVBM_CPU_CACHE_GB": "0.5", "DYN_KVBM_DISK_CACHE_GB": "0"},
        {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "1000", "DYN_KVBM_DISK_CACHE_GB": ""},
    ],
)
def test_a_raw_host_pool_before_our_tiers_is_accepted(environment: dict[str, str]) -> None:
    reconcile(KvbmSettings.read(environment), config(HOST, DISK), 64 * GIB)


def test_sizes_are_read_as_kvbm_means_them() -> None:
    settings = KvbmSettings.read({"DYN_KVBM_CPU_CACHE_GB": " 1.5 "})
    assert settings == KvbmSettings(1_500_000_000, True, False, Path("/tmp"))
    # A number of blocks overrides the size; how large a block is only KVBM knows.
    settings = KvbmSettings.read(
        {
            "DYN_KVBM_CPU_CACHE_GB": "4",
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "8",
            "DYN_KVBM_DISK_CACHE_GB": "7",
            "DYN_KVBM_DISK_CACHE_DIR": "/data",
        }
    )
    assert settings == KvbmSettings(0, True, True, Path("/data"))


@pytest.mark.parametrize("text", ["ten", "-1", "nan", "inf", "1e30"])
@pytest.mark.parametrize("name", ["DYN_KVBM_CPU_CACHE_GB", "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS"])
def test_what_is_no_size_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{text}'"):
        KvbmSettings.read({name: text})


@pytest.mark.parametrize(
    ("environment", "tiers", "message"),
    [
        ({}, [HOST], "set DYN_KVBM_CPU_CACHE_GB"),
        ({"DYN_KVBM_CPU_CACHE_GB": "0"}, [HOST], "set DYN_KVBM_CPU_CACHE_GB"),
        (
            {"DYN_KVBM_CPU_CACHE_GB": "1", "DYN_KVBM_DISK_CACHE_GB": "9"},
            [HOST, DISK],
            "disk tier /var/lib/kvtc holds compressed: unset DYN_KVBM_DISK_CACHE_GB",
        ),
        (
            {
                "DYN_KVBM_CPU_CACHE_GB": "1",
                "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "9",
                "DYN_KVBM_DISK_CACHE_DIR": "/raw",
            },
            [HOST],
            "in /raw would be read before the compressed tiers",
        ),
        ({"DYN_KVBM_CPU_CACHE_GB": "30"}, [HOST, DISK], "make DYN_KVBM_CPU_CACHE_GB or the host tier"),
    ],
)
def test_contradictions_are_refused(
    environment: dict[str, str], tiers: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        reconcile(KvbmSettings.read(environment), config(*tiers), 32 * GIB)


def test_memory_is_not_checked_where_the_limit_is_unknown() -> None:
    reconcile(KvbmSettings.read({"DYN_KVBM_CPU_CACHE_GB": "3000"}), config(HOST), None)


def test_this_process_has_a_limit() -> None:
    limit = memory_limit()
    assert limit is not None
    assert limit > 0
