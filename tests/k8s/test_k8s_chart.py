"""The chart: lint, values and their schema, contradictions, and the configuration file that it writes."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo_kvtc.config import check_config
from dynamo_kvtc.planning import KNOWN_MODELS, PlanRequest, chart_values, plan, read_model

helm_python = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")
render = importlib.import_module("render")

SETS = {name: render.read_values(path) for name, path in render.value_sets().items()}
WARNING = 2
GIB = 1 << 30


def resources(values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return list(yaml.load_all(render.render(values), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def only(kind: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    (found,) = (resource for resource in resources(values) if resource["kind"] == kind)
    return found


def config_file(values: dict[str, Any], folder: Path) -> Path:
    (found,) = (
        resource["data"]["kvtc.yaml"]
        for resource in resources(values)
        if resource["kind"] == "ConfigMap" and "kvtc.yaml" in resource["data"]
    )
    path = folder / "kvtc.yaml"
    path.write_text(found)
    return path


@pytest.mark.parametrize("values", [{}, *SETS.values()], ids=["defaults", *SETS])
def test_the_chart_lints(values: dict[str, Any]) -> None:
    report = helm_python.lint(render.CHART, values, strict=True, kube_version="v1.30.0")
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] >= WARNING] == []


@pytest.mark.parametrize("values", [{}, *SETS.values()], ids=["defaults", *SETS])
def test_the_configuration_file_passes_our_own_validation(values: dict[str, Any], tmp_path: Path) -> None:
    config, problems = check_config(config_file(values, tmp_path), {})
    assert problems == [] and config is not None
    assert [tier.kind for tier in config.tiers] == ["host", "disk"]
    assert str(config.artifact) == "/run/dynamo-kvtc/artifact"


def test_further_keys_reach_the_configuration_file_and_typos_in_them_are_found(tmp_path: Path) -> None:
    sound = {"config": {"policy": {"minimum_tokens": 2048}, "codec": {"sink_bits": 16}}}
    config, _ = check_config(config_file(sound, tmp_path), {})
    assert config is not None
    assert (config.policy.minimum_tokens, config.codec.sink_bits, config.codec.ratio) == (2048, 16, 20)
    _, problems = check_config(config_file({"config": {"policy": {"minimum_token": 1}}}, tmp_path), {})
    assert "did you mean minimum_tokens" in str(problems[0])


def test_raw_needs_neither_artifact_nor_job(tmp_path: Path) -> None:
    values = {"codec": {"profile": "raw", "ratio": None}}
    config, problems = check_config(config_file(values, tmp_path), {})
    assert config is not None and config.artifact is None, problems
    assert not {"Job", "PersistentVolumeClaim"} & {resource["kind"] for resource in resources(values)}


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(values)
    *folders, name = path.split(".")
    inner = made
    for folder in folders:
        inner = inner.setdefault(folder, {})
    inner[name] = value
    return made


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("modee", "aggregated"),
        ("mode", "agregated"),
        ("connector", "lmcache"),
        ("install.mode", "wheel"),
        ("install.image.tg", "1"),
        ("tiers.host.capcity", "64GiB"),
        ("tiers.host.capacity", "64GB"),
        ("tiers.disk.volume.size", "500GiB"),
        ("tiers.disk.volume.type", "nfs"),
        ("worker.memory", "128"),
        ("worker.sharedMemory", "8Gi"),
        ("worker.gpus", 0),
        ("worker.replicas", "8"),
        ("prefill.env", {"A": []}),
        ("artifact.id", "latest"),
        ("artifact.claim.accessModes", ["ReadWriteSome"]),
        ("runtime.version", "v1.6"),
        ("codec.profile", "zip"),
        ("codec.ratio", 0.5),
        ("codec.ratios", [20]),
        ("calibration.tokens", 1.5),
        ("calibration.texts", ["/etc/passwd"]),
        ("frontend.routerMode", "kvv"),
        ("frontend.hostCacheHitWeight", 2),
        ("rdma.resource", "rdma"),
        ("networkPolicy.enable", True),
        ("podDisruptionBudget.maxUnavailable", 0),
        ("monitoring.podMonitor.interval", "15"),
    ],
)
def test_typos_in_values_are_refused(path: str, value: Any) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        render.render(changed({}, path, value))
    assert path.split(".")[-1] in str(caught.value) or path.split(".")[-2] in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"calibration": {"enabled": False}}, "no artifact"),
        ({"calibration": {"texts": ["a.txt"]}}, "set calibration.textsClaim"),
        ({"calibration": {"textsClaim": "texts"}}, "calibration.texts is empty"),
        (
            {"calibration": {"texts": ["a"], "textsClaim": "a", "textsConfigMap": "b"}},
            "not from both",
        ),
        ({"tiers": {"host": {"enabled": False}, "disk": {"enabled": False}}}, "no tier"),
        ({"config": {"tiers": []}}, "config.tiers"),
        ({"codec": {"profile": "raw"}}, "set codec.ratio to null"),
        ({"codec": {"max_kl": 0.01}}, "set one of them to null"),
        ({"codec": {"ratio": None, "max_kl": 0.01}}, "not among calibration.maxKl"),
        ({"tiers": {"disk": {"capacity": "600GiB"}}}, "is smaller than tiers.disk.capacity"),
        ({"tiers": {"disk": {"volume": {"type": "hostPath"}}}}, "needs tiers.disk.volume.hostPath"),
        ({"tiers": {"disk": {"shared": True}}}, "only a folder of the node can be shared"),
        ({"tiers": {"host": {"capacity": "120GiB"}}}, "worker.memory .128Gi. does not hold"),
        ({"connector": "offloading"}, "is too small for offloading.poolGiB.*28Gi here"),
        ({"connector": "offloading", "offloading": {"chunkTokens": 100}}, "a multiple of model.blockSize"),
        ({"connector": "kvbm", "kvbm": {"cpuCacheGB": 64}}, "does not hold"),
        ({"mode": "disaggregated", "prefill": {"memory": "64Gi"}}, "prefill.memory"),
        ({"worker": {"gpus": 2}}, "a worker with tiers has one GPU"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        render.render(values)


def described(schema: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in schema.get("properties", {}).items():
        yield f"{place}.{name}", entry
        yield from described(entry, f"{place}.{name}")
    if isinstance(schema.get("items"), dict) and schema["items"].get("properties"):
        yield from described(schema["items"], f"{place}[]")


def test_every_value_is_described_and_no_unknown_one_is_taken() -> None:
    schema = json.loads((render.CHART / "values.schema.json").read_text())
    entries = dict(described(schema))
    assert len(entries) > 100
    for place, entry in entries.items():
        assert len(entry.get("description", "")) > 4, place
        if entry.get("properties"):
            assert entry["additionalProperties"] is False, place


def leaves(values: dict[str, Any], place: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{place}.{name}"
        if isinstance(value, dict):
            yield from leaves(value, f"{place}.{name}")


def test_every_value_has_a_default() -> None:
    schema = json.loads((render.CHART / "values.schema.json").read_text())
    values = yaml.safe_load((render.CHART / "values.yaml").read_text())
    optional = {
        ".global",
        ".imagePullSecrets[].name",
        *(f".codec.{name}" for name in ("max_kl", "sink_bits", "compute_dtype", "entropy", "threads")),
    }
    assert {place for place, _ in described(schema)} - optional <= set(leaves(values))


@pytest.mark.parametrize("connector", ["kvtc", "offloading", "kvbm"])
@pytest.mark.parametrize("mode", ["aggregated", "disaggregated"])
@pytest.mark.parametrize("model", sorted(KNOWN_MODELS))
def test_what_plan_prints_renders(model: str, mode: Any, connector: Any, tmp_path: Path) -> None:
    request = PlanRequest(
        read_model(model),
        gpus=8,
        gpu_memory=288 * GIB,
        ratio=12.5,
        mode=mode,
        connector=connector,
        memory=192 * GIB,
    )
    values = chart_values(plan(request))
    config, problems = check_config(config_file(values, tmp_path), {})
    assert config is not None, problems
    job = only("Job", values)["spec"]["template"]["spec"]["containers"][0]
    assert job["args"][job["args"].index("--ratios") + 1] == "10,20,40,80,12.5"


def test_the_names_of_calibrations_follow_from_what_they_depend_on() -> None:
    def name(values: dict[str, Any]) -> str:
        return str(only("Job", values)["metadata"]["name"])

    first = name({})
    assert first == name({}) == name({"worker": {"replicas": 3}, "calibration": {"memory": "64Gi"}})
    assert first == name({"codec": {"ratio": 40}})  # another plan of the same artifact
    others = [
        {"model": {"name": "Qwen/Qwen3-8B"}},
        {"calibration": {"tokens": 40_000}},
        {"calibration": {"seed": 1}},
        {"codec": {"ratio": 30}},
        {"codec": {"profile": "kvtc"}},
        {"calibration": {"textsClaim": "texts", "texts": ["a.txt"]}},
    ]
    names = {name(values) for values in others}
    assert len(names) == len(others) and first not in names


def test_workers_start_anew_when_artifact_or_configuration_changes() -> None:
    def template(values: dict[str, Any]) -> Any:
        return only("DynamoGraphDeployment", values)["spec"]["components"][1]["podTemplate"]

    base = template({})
    for values in (
        {"codec": {"ratio": 40}},
        {"config": {"policy": {"minimum_tokens": 64}}},
        {"calibration": {"seed": 1}},
        {"artifact": {"id": "ab" * 32}},
    ):
        assert template(values) != base
    assert template({"calibration": {"cpu": "4"}}) == base


def test_workers_of_a_node_may_share_its_folder(tmp_path: Path) -> None:
    volume = {"type": "hostPath", "hostPath": "/mnt/nvme"}
    values = {"tiers": {"disk": {"shared": True, "volume": volume}}}
    config, problems = check_config(config_file(values, tmp_path), {})
    assert config is not None, problems
    assert config.tiers[1].shared is True
    worker = only("DynamoGraphDeployment", values)["spec"]["components"][1]
    assert "affinity" not in worker["podTemplate"]["spec"]


def test_the_disk_is_encrypted_with_the_keys_of_a_secret(tmp_path: Path) -> None:
    encryption = {"secret": "kv-keys", "keys": ["new", "2026-11-01"]}
    values = changed(SETS["disaggregated"], "security.encryption", encryption)
    config, problems = check_config(config_file(values, tmp_path), {})
    assert problems == [] and config is not None
    host, disk = config.tiers
    assert host.encryption is None and disk.encryption is not None
    files = {key.id: str(key.file) for key in disk.encryption.keys}
    assert files == {name: f"/etc/dynamo-kvtc-keys/{name}" for name in encryption["keys"]}
    mounted = {}
    for component in only("DynamoGraphDeployment", values)["spec"]["components"]:
        pod = component["podTemplate"]["spec"]
        volumes = [one["secret"] for one in pod.get("volumes", []) if one["name"] == "keys"]
        mounts = [
            (container["name"], mount["mountPath"], mount["readOnly"])
            for container in (*pod.get("initContainers", []), *pod["containers"])
            for mount in container.get("volumeMounts", [])
            if mount["name"] == "keys"
        ]
        mounted[component["type"]] = (volumes, mounts)
    (secret,), mounts = mounted.pop("prefill")
    assert mounts == [("main", "/etc/dynamo-kvtc-keys", True)]
    assert secret["secretName"] == "kv-keys" and secret["defaultMode"] == 0o440
    assert [item["path"] for item in secret["items"]] == encryption["keys"]
    # Nobody else gets them.
    assert set(mounted) == {"frontend", "decode"}
    assert all(found == ([], []) for found in mounted.values())
    open_pod = changed(values, "podSecurityContext", {"fsGroup": None})
    pods = only("DynamoGraphDeployment", open_pod)["spec"]["components"]
    volumes = [one for pod in pods for one in pod["podTemplate"]["spec"].get("volumes", [])]
    assert [one["secret"]["defaultMode"] for one in volumes if one["name"] == "keys"] == [0o444]


@pytest.mark.parametrize(
    ("encryption", "disk", "message"),
    [
        ({"secret": "kv-keys", "keys": []}, True, "security.encryption.keys is empty"),
        ({"secret": "kv-keys", "keys": ["a"]}, False, "security.encryption is of the disk tier"),
    ],
)
def test_encryption_that_encrypts_nothing_is_refused(
    encryption: dict[str, Any], disk: bool, message: str
) -> None:
    values = changed(changed({}, "security.encryption", encryption), "tiers.disk.enabled", disk)
    with pytest.raises(Exception, match=re.escape(message)):
        render.render(values)


def test_our_own_endpoint_is_opened_and_scraped(tmp_path: Path) -> None:
    values = {"monitoring": {"endpoint": "own", "port": 9999, "podMonitor": {"enabled": True}}}
    config, _ = check_config(config_file(values, tmp_path), {})
    assert config is not None
    assert (config.observability.metrics_port, config.observability.metrics_address) == (9999, "0.0.0.0")
    container = only("DynamoGraphDeployment", values)["spec"]["components"][1]["podTemplate"]["spec"][
        "containers"
    ][0]
    assert container["ports"] == [{"name": "kvtc", "containerPort": 9999}]
    assert only("PodMonitor", values)["spec"]["podMetricsEndpoints"][0]["port"] == "kvtc"
    policies = [entry for entry in resources(values) if entry["kind"] == "NetworkPolicy"]
    assert {"port": 9999, "protocol": "TCP"} in policies[0]["spec"]["ingress"][1]["ports"]
    changes = {"monitoring": {"endpoint": "system", "podMonitor": {"enabled": True}}}
    endpoint = only("PodMonitor", changes)["spec"]["podMetricsEndpoints"][0]
    assert endpoint["port"] == "system"
    (renaming,) = endpoint["metricRelabelings"]
    match = re.fullmatch(renaming["regex"], "vllm:kvtc_offloaded_tokens_total")
    assert match is not None and renaming["targetLabel"] == "__name__"
    assert renaming["replacement"].replace("${1}", match[1]) == "dynamo_kvtc_offloaded_tokens_total"
    config, _ = check_config(config_file(changes, tmp_path), {})
    assert config is not None and config.observability.metrics_port is None


@pytest.mark.parametrize("name", SETS)
def test_every_host_is_scraped_at_the_port_that_its_workers_open(name: str, tmp_path: Path) -> None:
    values = changed(SETS[name], "monitoring.podMonitor.enabled", True)
    config, _ = check_config(config_file(values, tmp_path), {})
    assert config is not None and config.observability.metrics_port == 9464
    kind = "prefill" if values.get("mode") == "disaggregated" else "worker"
    (tiered,) = (
        entry
        for entry in only("DynamoGraphDeployment", values)["spec"]["components"]
        if entry["type"] == kind
    )
    ports = tiered["podTemplate"]["spec"]["containers"][0]["ports"]
    assert {"name": "kvtc", "containerPort": 9464} in ports
    assert only("PodMonitor", values)["spec"]["podMetricsEndpoints"][0]["port"] == "kvtc"


def test_every_dashboard_gets_a_config_map_as_it_is() -> None:
    made = {
        name: text
        for resource in resources({"monitoring": {"dashboards": {"enabled": True}}})
        if resource["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in resource["data"].items()
    }
    dashboards = {path.name: path.read_text() for path in (render.CHART / "dashboards").glob("*.json")}
    assert {name: json.loads(text) for name, text in made.items()} == {
        name: json.loads(text) for name, text in dashboards.items()
    }
