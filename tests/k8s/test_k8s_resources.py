"""What the chart renders, as an API server would see it, for every set of values; no cluster is needed."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import crd
import kubernetes_validate
import pytest
import yaml

pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")
render = importlib.import_module("render")


def load_all(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


SETS = {name: load_all(render.render(render.read_values(path))) for name, path in render.value_sets().items()}
CORE = {"ConfigMap", "Job", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget"}
#: Kinds whose schemas are in no package: Dynamo's own, and the Prometheus operator's.
CUSTOM = {"DynamoGraphDeployment", "PodMonitor", "PrometheusRule"}

needs_crd = pytest.mark.skipif(
    crd.CRD is None, reason="Dynamo's CRD is not there: ../shared/crds/nvidia.com_dynamographdeployments.yaml"
)


def graph(name: str = "aggregated") -> dict[str, Any]:
    (found,) = (entry for entry in SETS[name] if entry["kind"] == "DynamoGraphDeployment")
    return copy.deepcopy(found)


def component(name: str, kind: str) -> dict[str, Any]:
    (found,) = (entry for entry in graph(name)["spec"]["components"] if entry["type"] == kind)
    return found


def main(name: str, kind: str) -> dict[str, Any]:
    (found,) = component(name, kind)["podTemplate"]["spec"]["containers"]
    return found


def argument(name: str, kind: str, flag: str) -> str:
    arguments = main(name, kind)["args"]
    return str(arguments[arguments.index(flag) + 1])


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


@pytest.mark.parametrize("version", ["1.30.0", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", SETS)
def test_core_kinds_are_valid(name: str, version: str) -> None:
    kinds = set()
    for resource in SETS[name]:
        kinds.add(resource["kind"])
        if resource["kind"] in CORE:
            kubernetes_validate.validate(resource, version, strict=True)
    assert kinds <= CORE | CUSTOM and kinds >= CORE


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Job", "spec.backofLimit", 3),
        ("Job", "spec.template.spec.containers.0.comand", ["sh"]),
        ("Job", "spec.template.spec.containers.0.resources.limit", {}),
        ("Job", "spec.backoffLimit", "three"),
        ("NetworkPolicy", "spec.podSelecter", {}),
        ("PodDisruptionBudget", "spec.maxUnavailible", 1),
        ("PersistentVolumeClaim", "spec.resources.requests.storage", {}),
        ("ConfigMap", "datas", {}),
    ],
)
def test_typos_in_core_kinds_are_caught(kind: str, path: str, value: Any) -> None:
    resource = copy.deepcopy(next(entry for entry in SETS["aggregated"] if entry["kind"] == kind))
    put(resource, path, value)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, "1.30.0", strict=True)


def put(resource: Any, path: str, value: Any) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        resource = resource[int(folder) if folder.isdecimal() else folder]
    resource[int(name) if name.isdecimal() else name] = value


@needs_crd
@pytest.mark.parametrize("name", SETS)
def test_deployments_are_valid_by_dynamos_schema(name: str) -> None:
    assert crd.problems(graph(name)) == []


POD = "spec.components.1.podTemplate.spec"


@needs_crd
@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.component", [], "'component' was unexpected"),
        ("spec.backendFramework", "vlm", "'vlm' is not one of"),
        ("spec.components.1.sharedMemory", "8Gi", "'sharedMemory' was unexpected"),
        ("spec.components.1.sharedMemorySize", "8GiB", "does not match"),
        ("spec.components.1.type", "prefiller", "is not one of"),
        ("spec.components.1.replicas", "8", "is not of type 'integer'"),
        ("spec.components.1.runtimeVersionOverride", "v1.6.1", "does not match"),
        (f"{POD}.containers.0.enviroment", [], "'enviroment' was unexpected"),
        (f"{POD}.containers.0.securityContext.capabilities.ad", [], "'ad' was unexpected"),
        (f"{POD}.volumes.3.ephemeral.volumeClaim", {}, "'volumeClaim' was unexpected"),
        (f"{POD}.initContainers.0.volumeMounts.0.mountpath", "/x", "'mountpath' was unexpected"),
        ("metadata.label", {}, "'label' was unexpected"),
    ],
)
def test_typos_in_deployments_are_caught(path: str, value: Any, said: str) -> None:
    resource = graph()
    put(resource, path, value)
    assert any(said in problem for problem in crd.problems(resource)), crd.problems(resource)


@needs_crd
@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.components.1.name", "FRONTEND", "unique case-insensitively"),
        ("spec.components.1.eppConfig", {"config": {}}, "eppConfig may only be set"),
        ("spec.components.1.minAvailable", 9, "less than or equal to replicas"),
        ("spec.restart", {"id": "now"}, "must be unset on create"),
        (f"{POD}.initContainers.0.image", "", "init containers must specify"),
        (f"{POD}.containers.0.name", "worker", None),
        ("spec.experimental", {"kvTransferPolicy": {"domain": "zone"}}, "exactly one of labelKey"),
        (
            "spec.components.1.podTemplate.metadata.annotations",
            {"nvidia.com/vllm-distributed-executor-backend": "Rays"},
            "must be mp or ray",
        ),
    ],
)
def test_rules_of_dynamos_schema_are_enforced(path: str, value: Any, said: str | None) -> None:
    resource = graph()
    put(resource, path, value)
    found = crd.problems(resource)
    if said is None:  # a sidecar with an image is fine by the schema
        assert found == []
    else:
        assert any(said in problem for problem in found), found


@needs_crd
def test_every_rule_of_dynamos_schema_can_be_read() -> None:
    rules = list(crd.rules())
    assert len(rules) > 10
    for rule in rules:
        crd.compile_rule(rule)


@pytest.mark.parametrize("name", SETS)
def test_transfer_configurations_are_what_dynamo_takes(name: str) -> None:
    kinds = {entry["type"] for entry in graph(name)["spec"]["components"]} - {"frontend"}
    for kind in kinds:
        config = json.loads(argument(name, kind, "--kv-transfer-config"))
        assert config["kv_role"] == "kv_both"
        assert config["kv_load_failure_policy"] == "recompute"
        children = config.get("kv_connector_extra_config", {}).get("connectors", [])
        connectors = [child["kv_connector"] for child in children]
        if kind == "decode":
            assert config["kv_connector"] == "NixlConnector" and not children
        elif kind == "prefill":
            # Dynamo's prefill workers take a wrapper around exactly one connector that knows their protocol.
            assert config["kv_connector"] in ("MultiConnector", "PdConnector")
            assert connectors.count("NixlConnector") == 1 and len(connectors) == 2
            if config["kv_connector"] == "PdConnector":
                assert connectors == ["DynamoConnector", "NixlConnector"]
        else:
            assert not children
        own = [child for child in (children or [config]) if child["kv_connector"] != "NixlConnector"]
        assert len(own) == (kind != "decode")
        for child in own:
            assert child["kv_load_failure_policy"] == "recompute"
            extra = child["kv_connector_extra_config"]
            (ours,) = extra.get("secondary_tiers", [extra])
            assert ours["config"] == "/etc/dynamo-kvtc/kvtc.yaml"
            if child["kv_connector"] == "OffloadingConnector":
                assert extra["self_describing_kv_events"] is True and ours["enable_kv_events"] is True
                assert extra["block_size"] == 256
                assert ours["attention_backend"] == argument(name, kind, "--attention-backend")
                assert extra["cpu_bytes_to_use"] % (1 << 30) == 0
                size = component(name, kind)["sharedMemorySize"]
                assert (int(size[:-2]) - 8 << 30) >= 1.2 * extra["cpu_bytes_to_use"]


@pytest.mark.parametrize("name", SETS)
def test_router_and_workers_agree(name: str) -> None:
    frontend = environment(main(name, "frontend"))
    assert frontend["DYN_ROUTER_MODE"] == "kv" and frontend["DYN_ROUTER_USE_KV_EVENTS"] == "true"
    for entry in graph(name)["spec"]["components"]:
        if entry["type"] == "frontend":
            continue
        container = main(name, entry["type"])
        variables = environment(container)
        assert variables["PYTHONHASHSEED"] == frontend["PYTHONHASHSEED"] == "0"
        assert variables["VLLM_NIXL_SIDE_CHANNEL_HOST"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        assert argument(name, entry["type"], "--block-size") == frontend["DYN_KV_CACHE_BLOCK_SIZE"]
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        if entry["type"] == "decode":
            assert "--kv-events-config" not in container["args"]
        else:
            events = json.loads(argument(name, entry["type"], "--kv-events-config"))
            assert events["enable_kv_cache_events"] is True and events["publisher"] == "zmq"


def test_rdma_is_asked_for_in_requests_and_limits() -> None:
    for kind in ("prefill", "decode"):
        resources = main("disaggregated", kind)["resources"]
        assert resources["requests"]["rdma/ib"] == resources["limits"]["rdma/ib"] == "1"
    assert "rdma/ib" not in main("aggregated", "worker")["resources"]["limits"]


def test_a_folder_of_the_node_serves_one_worker() -> None:
    spec = component("wheel", "worker")["podTemplate"]["spec"]
    (term,) = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert term["labelSelector"]["matchLabels"].items() <= (
        component("wheel", "worker")["podTemplate"]["metadata"]["labels"].items()
    )


def test_the_wheel_is_installed_before_anything_needs_it() -> None:
    spec = component("wheel", "worker")["podTemplate"]["spec"]
    assert [container["name"] for container in spec["initContainers"]] == ["install", "prepare"]
    for container in (spec["initContainers"][1], spec["containers"][0]):
        assert environment(container)["PYTHONPATH"] == "/opt/dynamo-kvtc"
        assert container["image"] == "nvcr.io/nvidia/ai-dynamo/vllm-runtime:1.6.1"
        assert "/opt/dynamo-kvtc" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert environment(spec["containers"][0])["DYNAMO_KVTC__SECURITY__SALT"] == {
        "secretKeyRef": {"name": "dynamo-kvtc-salt", "key": "salt"}
    }


@pytest.mark.parametrize("name", SETS)
def test_every_mount_has_a_volume_and_every_selector_a_pod(name: str) -> None:
    labels = []
    for resource in SETS[name]:
        if resource["kind"] == "Job":
            templates = [resource["spec"]["template"]]
        elif resource["kind"] == "DynamoGraphDeployment":
            templates = [entry["podTemplate"] for entry in resource["spec"]["components"]]
        else:
            continue
        for template in templates:
            labels.append(template["metadata"]["labels"])
            spec = template["spec"]
            volumes = [volume["name"] for volume in spec.get("volumes", [])]
            assert len(set(volumes)) == len(volumes)
            mounted = {
                mount["name"]
                for container in spec["containers"] + spec.get("initContainers", [])
                for mount in container.get("volumeMounts", [])
            }
            assert mounted == set(volumes)
    for resource in SETS[name]:
        spec = resource.get("spec", {})
        selector = spec.get("podSelector") or (spec.get("selector") if resource["kind"] != "Job" else None)
        if selector:
            wanted = selector["matchLabels"].items()
            assert any(wanted <= pod.items() for pod in labels), resource["metadata"]["name"]
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in SETS[name]]
    assert len(set(names)) == len(names)


def test_the_plain_manifests_are_what_the_chart_renders() -> None:
    wanted = render.files()
    assert set(render.MANIFESTS.rglob("*.yaml")) == set(wanted)
    for path, text in wanted.items():
        assert path.read_text() == text, f"{path} is stale: run `make manifests`"


@pytest.mark.parametrize("folder", [*(f"manifests/{name}" for name in SETS), "overlays/example"])
def test_kustomize_builds(folder: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run(
        [kubectl, "kustomize", str(render.K8S / folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    made = load_all(built.stdout)
    if folder == "overlays/example":
        assert {resource["metadata"]["namespace"] for resource in made} == {"serving"}
        (deployment,) = (entry for entry in made if entry["kind"] == "DynamoGraphDeployment")
        worker = deployment["spec"]["components"][1]
        assert worker["replicas"] == 2
        assert (
            worker["podTemplate"]["spec"]["containers"][0]["image"] == "registry.example.com/vllm-kvtc:1.6.1"
        )
        if crd.CRD is not None:
            assert crd.problems(deployment) == []
    else:
        key = lambda resource: (resource["kind"], resource["metadata"]["name"])  # noqa: E731
        assert sorted(made, key=key) == sorted(SETS[Path(folder).name], key=key)


def test_the_dockerfiles_base_is_the_runtime_of_the_chart() -> None:
    values = yaml.safe_load((render.CHART / "values.yaml").read_text())["runtime"]
    lines = (render.K8S / "Dockerfile").read_text().splitlines()
    assert f"FROM {values['repository']}:{values['tag']}" in lines


def our_classes() -> list[tuple[str, str]]:
    """Module and class of ours that some set of values names to vLLM."""
    found = set()
    for name in SETS:
        for entry in graph(name)["spec"]["components"]:
            if entry["type"] == "frontend":
                continue
            pending = [json.loads(argument(name, entry["type"], "--kv-transfer-config"))]
            while pending:
                config = pending.pop()
                module = config.get("kv_connector_module_path") or config.get("module_path") or ""
                if module.startswith("dynamo_kvtc"):
                    found.add((module, config.get("kv_connector") or config["type"]))
                extra = config.get("kv_connector_extra_config", {})
                pending += extra.get("connectors", []) + extra.get("secondary_tiers", [])
    return sorted(found)


def test_each_connector_names_a_class_of_ours() -> None:
    assert len(our_classes()) == 3


@pytest.mark.parametrize(("module", "name"), our_classes())
def test_classes_that_vllm_is_told_exist(module: str, name: str) -> None:
    place = render.K8S.parent.joinpath(*module.split("."))
    source = next(
        (path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None
    )
    if source is None:
        pytest.skip(f"{module} is not in the package yet")
    # Not imported: that needs vLLM.
    tree = ast.parse(source.read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert name in defined | imported
