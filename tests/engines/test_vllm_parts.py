"""Parts of the vLLM connector against vLLM's own types: layouts, refusals, statistics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

import torch
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_cache_interface import KVQuantMode, MLAAttentionSpec, SlidingWindowSpec
from vllm_configs import HEADS, LAYER, SIZE, TOKENS, cache_config, engine_config, spec

from dynamo_kvtc.adapters.vllm import KvtcConnector
from dynamo_kvtc.adapters.vllm.layouts import cpu_writer, discover_places, ordered_layers, paged_cache
from dynamo_kvtc.adapters.vllm.settings import read_settings
from dynamo_kvtc.adapters.vllm.stats import SchedulerStats, WorkerStats
from dynamo_kvtc.adapters.vllm.versions import check_version
from dynamo_kvtc.errors import ConfigError, LayoutError
from dynamo_kvtc.observability import Counters, exposition
from dynamo_kvtc.pipeline.permuted import PermutedKvCache

# --- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_order_is_found_and_undone(dtype: torch.dtype) -> None:
    write = cpu_writer(spec(dtype))
    places = discover_places(TOKENS, HEADS, SIZE, dtype, write)
    tensor = torch.zeros((4, HEADS, TOKENS, 2 * SIZE), dtype=dtype)
    cache = PermutedKvCache([tensor.view(4, -1)], *places)
    keys, values = torch.randn(2, TOKENS, HEADS, SIZE).to(dtype)
    write(tensor, keys, values)
    gathered = cache.gather([1])
    assert torch.equal(gathered[0][:, 0], keys) and torch.equal(gathered[1][:, 0], values)
    # What is scattered is what vLLM's operator would have written, bit for bit.
    cache.scatter_layer(0, [3], keys, values)
    assert torch.equal(tensor[3], tensor[1]) and not tensor[0].any() and not tensor[2].any()


def test_a_writer_that_loses_or_mixes_elements_is_refused() -> None:
    def loses(cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        cache[1].view(-1)[: keys.numel() - 1] = keys.flatten()[1:]

    def strays(cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        cache[0].view(-1)[: keys.numel()] = keys.flatten()

    for writer, message in ((loses, "one place"), (strays, "outside")):
        with pytest.raises(LayoutError, match=message):
            discover_places(TOKENS, HEADS, SIZE, torch.bfloat16, writer)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_gpu_layouts_are_views_of_vllms_tensors(order: tuple[int, ...]) -> None:
    # No GPU backend can be made here: only its name is stood in for.
    shape = (4, HEADS, TOKENS, 2 * SIZE)
    backing = torch.randn([shape[axis] for axis in order])
    tensor = backing.permute([order.index(axis) for axis in range(4)])
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    context = {LAYER.format(0): SimpleNamespace(attn_backend=backend)}
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    cache = paged_cache(config, cache_config(), [(LAYER.format(0), tensor)])
    keys, values = cache.gather([2])
    for token in range(TOKENS):
        assert torch.equal(keys[token, 0], tensor[2, :, token, :SIZE])
        assert torch.equal(values[token, 0], tensor[2, :, token, SIZE:])
    cache.scatter_layer(0, [1], keys[:, 0], values[:, 0])
    assert torch.equal(tensor[1], tensor[2])
    backend.get_name = lambda: "SOMETHING_NEW"
    with pytest.raises(LayoutError, match="SOMETHING_NEW"):
        paged_cache(config, cache_config(), [(LAYER.format(0), tensor)])
    with pytest.raises(LayoutError, match="--block-size"):
        paged_cache(config, cache_config(blocks=2), [(LAYER.format(0), tensor)])


def test_layers_are_in_the_models_order_and_shared_ones_count_once() -> None:
    tensors = [torch.zeros(2) for _ in range(12)]
    caches = {LAYER.format(index): tensors[index] for index in reversed(range(12))}
    caches[LAYER.format(12)] = tensors[3]
    assert [name for name, _ in ordered_layers(caches)] == [LAYER.format(index) for index in range(12)]


# --- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "kvtc.yaml"
    path.write_text("codec: {profile: raw}\ntiers:\n  - {kind: host, capacity: 1MiB}\n")
    return path


def test_settings_are_read(tmp_path: Path, settings_file: Path) -> None:
    extra = {"config": str(settings_file), "load": "layerwise", "lookup_timeout": "20ms"}
    settings = read_settings(engine_config(tmp_path, settings_file, extra), cache_config())
    assert settings.layerwise and settings.loads and settings.saves and not settings.events
    assert settings.lookup_timeout_s == pytest.approx(0.02) and settings.block_size == TOKENS
    assert KvtcConnector.requires_piecewise_for_cudagraph(extra)
    assert not KvtcConnector.requires_piecewise_for_cudagraph({})


def test_roles_are_kept(tmp_path: Path, settings_file: Path) -> None:
    producer = read_settings(engine_config(tmp_path, settings_file, kv_role="kv_producer"), cache_config())
    assert producer.saves and not producer.loads


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, '"config"'),
        ({"confg": "x"}, "did you mean config"),
        ({"config": "x", "load": "soon"}, "layerwise"),
    ],
)
def test_wrong_extra_config_is_refused(
    tmp_path: Path, settings_file: Path, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(engine_config(tmp_path, settings_file, extra), cache_config())


def test_settings_of_vllm_that_would_serve_wrong_kv_are_refused(tmp_path: Path, settings_file: Path) -> None:
    config = engine_config(tmp_path, settings_file, kv_load_failure_policy="fail")
    with pytest.raises(ConfigError, match="kv_load_failure_policy"):
        read_settings(config, cache_config())
    config = engine_config(tmp_path, settings_file)
    config.cache_config.prefix_caching_hash_algo = "xxhash"
    with pytest.raises(ConfigError, match="sha256"):
        read_settings(config, cache_config())
    for setting in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"):
        config = engine_config(tmp_path, settings_file)
        setattr(config.parallel_config, setting, 2)
        with pytest.raises(ConfigError, match=setting.replace("_", "-")):
            read_settings(config, cache_config())


def test_drafters_with_kv_of_their_own_are_refused(tmp_path: Path, settings_file: Path) -> None:
    ngram = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
    config = engine_config(tmp_path, settings_file, engine=ngram)
    assert read_settings(config, cache_config()).loads
    # What vLLM would load a second model for; its settings without the model.
    config.speculative_config.method = "eagle"
    with pytest.raises(ConfigError, match=r"eagle is not supported.*ngram"):
        read_settings(config, cache_config())


def test_caches_that_cannot_be_encoded_are_refused(tmp_path: Path, settings_file: Path) -> None:
    config = engine_config(tmp_path, settings_file)
    window = SlidingWindowSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32, sliding_window=128
    )
    latent = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=576, dtype=torch.float32)
    for specs, message in (
        ((spec(), window), "2 groups"),
        ((window,), "SlidingWindowSpec"),
        ((latent,), "MLA caches"),
        ((spec(sliding_window=64),), "sliding-window"),
        ((spec(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR),), "--kv-cache-dtype"),
        ((spec(head_size_v=32),), "different sizes"),
    ):
        with pytest.raises(LayoutError, match=message):
            read_settings(config, cache_config(*specs))
    with pytest.raises(ConfigError, match="multiple of the engine's block size"):
        read_settings(config, cache_config(spec(block_size=96)))


@pytest.mark.parametrize("version", ["0.30.2", "0.33.0", "1.31.0", "dev"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.31 and 0\.32"):
        check_version(version)


def test_known_versions_are_taken() -> None:
    for version in ("0.31.0", "0.31.1+cpu", "0.32.0rc1"):
        check_version(version)


# --- statistics ------------------------------------------------------------------------------------


STATUS: dict[str, Any] = {
    "artifact": {"id": "ab", "profile": "rd", "plan": "ratio=20"},
    "version": "1",
    "tiers": {"host0": {"stored_bytes": 100, "pauses": 0}},
}


def test_statistics_are_growths_that_add_up() -> None:
    source, counters = WorkerStats(), Counters()
    counters.offloaded(blocks=1, tokens=256, raw_bytes=1000, stored_bytes=50)
    counters.dropped("queue_full", 2)
    first = source.take(counters.snapshot(), STATUS)
    assert first is not None and first.data["grown"]["dropped_blocks_total|queue_full"] == 2
    assert first.data["now"]["tier_stored_bytes|host0"] == 100
    assert source.take(counters.snapshot(), STATUS) is None
    counters.offloaded(blocks=1, tokens=256, raw_bytes=1000, stored_bytes=50)
    second = source.take(counters.snapshot(), {**STATUS, "tiers": {"host0": {"stored_bytes": 150}}})
    assert second is not None
    rebuilt = KvtcConnector.build_kv_connector_stats(json.loads(json.dumps(second.to_dict())))
    both = first.aggregate(rebuilt)
    assert both.data["now"]["tier_stored_bytes|host0"] == 150
    assert both.reduce() == {
        "offloaded tokens": 512,
        "onboarded tokens": 0,
        "ratio": 20.0,
        "dropped_blocks_total|queue_full": 2,
    }
    assert SchedulerStats().take(0) is None


def test_every_metric_of_the_reference_is_on_vllms_port(tmp_path: Path, settings_file: Path) -> None:
    """What `dynamo_kvtc_…` says on our own endpoint, `vllm:kvtc_…` says on vLLM's."""
    counters = Counters()
    counters.offloaded(blocks=1, tokens=256, raw_bytes=1000, stored_bytes=50)
    counters.missed("damaged", 1)
    counters.onboard_ended("complete", seconds=0.3, first_layer_s=0.1, transfer_s=0.2, decode_s=0.2)
    status = {**STATUS, "counters": counters.snapshot().to_dict()}
    metrics = KvtcConnector.build_prom_metrics(
        engine_config(tmp_path, settings_file),
        {Counter: Counter, Gauge: Gauge, Histogram: Histogram},
        ["model_name", "engine"],
        {0: ["m", "0"]},
    )
    source, scheduler = WorkerStats(), SchedulerStats()
    for _ in range(2):  # the second time there is nothing new
        stats = source.take(counters.snapshot(), status)
        if stats is not None:
            metrics.observe(json.loads(json.dumps(stats.to_dict())))
    failed = scheduler.take(3)
    assert failed is not None
    metrics.observe(failed.to_dict())
    theirs = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(REGISTRY).decode())
        for sample in family.samples
        if sample.name.startswith("vllm:kvtc_") and not sample.name.endswith("_created")
    }
    ours = {
        (
            sample.name.replace("dynamo_kvtc_", "vllm:kvtc_"),
            *sorted({**sample.labels, "model_name": "m", "engine": "0"}.items()),
        ): sample.value
        for family in text_string_to_metric_families(exposition(status)[0].decode())
        for sample in family.samples
    }
    lookups = ("vllm:kvtc_failed_lookups_total", ("engine", "0"), ("model_name", "m"))
    assert theirs.pop(lookups) == 3
    assert theirs == ours


def test_the_class_is_found_by_name_as_multiconnector_does() -> None:
    assert KVConnectorFactory.get_connector_class_by_name("KvtcConnector") is KvtcConnector
