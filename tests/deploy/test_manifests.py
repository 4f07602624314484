"""Every overlay builds, is valid and meets the policy; invalid manifests and violations are found."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc_health.v1 import health_pb2
from mtlora_pb.v1 import inference_pb2
from openinference_pb import grpc_predict_v2_pb2

from deploy import manifests
from server.settings import ENV_PREFIX, Settings

OVERLAYS = sorted(path.parent.name for path in manifests.OVERLAYS.glob("*/kustomization.yaml"))
needs_kustomize = pytest.mark.skipif(
    not (shutil.which("kustomize") or shutil.which("kubectl")), reason="neither kustomize nor kubectl is installed"
)


@pytest.fixture(scope="module", params=OVERLAYS)
def built(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return manifests.build(manifests.OVERLAYS / request.param)


@pytest.fixture(scope="module")
def cpu() -> list[dict[str, Any]]:
    return manifests.build(manifests.OVERLAYS / "cpu")


@pytest.fixture(scope="module")
def pool() -> list[dict[str, Any]]:
    return manifests.build(manifests.OVERLAYS / "inference-pool")


@pytest.fixture(scope="module")
def gpu() -> list[dict[str, Any]]:
    return manifests.build(manifests.OVERLAYS / "gpu")


@pytest.fixture(scope="module")
def multi_node() -> list[dict[str, Any]]:
    return manifests.build(manifests.OVERLAYS / "multi-node")


def test_lists_every_overlay() -> None:
    assert OVERLAYS == ["cpu", "gpu", "gpu-tp", "inference-pool", "multi-node"]


@pytest.mark.slow
@needs_kustomize
def test_overlays_are_valid_and_meet_the_policy(built: list[dict[str, Any]]) -> None:
    assert [found for manifest in built for found in manifests.validate(manifest)] == []
    assert manifests.violations(built) == []


@needs_kustomize
def test_every_variable_of_the_config_map_is_a_setting(built: list[dict[str, Any]]) -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert manifests.server_settings(built).keys() <= known


@pytest.mark.slow
@needs_kustomize
def test_with_a_volume_for_usage_each_replica_has_one_of_its_own(tmp_path: Path) -> None:
    """Component usage-volume on overlay cpu."""
    component = manifests.FOLDER / "kubernetes" / "components" / "usage-volume"
    folders = {"resources": manifests.OVERLAYS / "cpu", "components": component}
    # kustomize takes relative paths alone.
    names = {key: [os.path.relpath(folder, tmp_path.resolve())] for key, folder in folders.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(names))
    found = manifests.build(tmp_path)
    assert [wrong for manifest in found for wrong in manifests.validate(manifest)] == []
    assert manifests.violations(found) == []
    assert "Deployment" not in {manifest["kind"] for manifest in found}
    replicas = one(found, "StatefulSet")["spec"]
    (claim,) = replicas["volumeClaimTemplates"]
    mounts = replicas["template"]["spec"]["containers"][0]["volumeMounts"]
    folder = manifests.server_settings(found)["MTLORA_USAGE_DIR"]
    assert {"name": claim["metadata"]["name"], "mountPath": folder} in mounts
    assert one(found, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["kind"] == "StatefulSet"


@needs_kustomize
def test_the_gateway_passes_both_contracts_and_health(built: list[dict[str, Any]]) -> None:
    (route,) = (each for each in built if each["kind"] in ("GRPCRoute", "HTTPRoute"))
    (rule,) = route["spec"]["rules"]
    modules = {inference_pb2: "Inference", grpc_predict_v2_pb2: "GRPCInferenceService", health_pb2: "Health"}
    names = [module.DESCRIPTOR.services_by_name[name].full_name for module, name in modules.items()]
    if route["kind"] == "GRPCRoute":
        assert rule["matches"] == [{"method": {"service": name}} for name in names]
    else:
        assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": f"/{name}/"}} for name in names]


def pod(found: list[dict[str, Any]]) -> dict[str, Any]:
    return one(found, "Deployment")["spec"]["template"]["spec"]


def server(found: list[dict[str, Any]]) -> dict[str, Any]:
    return pod(found)["containers"][0]


def one(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(manifest for manifest in found if manifest["kind"] == kind)


def rewrite(found: list[dict[str, Any]], file: str, old: str, new: str) -> None:
    """Text of a file of the endpoint picker."""
    data = next(each for each in found if manifests.PICKER in each.get("data", {}))["data"]
    assert old in data[file]
    data[file] = data[file].replace(old, new)


Damage = Callable[[list[dict[str, Any]]], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "root": (lambda m: pod(m)["securityContext"].pop("runAsNonRoot"), "runs as root"),
    "seccomp": (lambda m: pod(m)["securityContext"].pop("seccompProfile"), "no seccomp"),
    "token": (lambda m: pod(m).update(automountServiceAccountToken=True), "has a token"),
    "service links": (lambda m: pod(m).pop("enableServiceLinks"), "would set MTLORA_PORT"),
    "host network": (lambda m: pod(m).update(hostNetwork=True), "namespace of the node"),
    "host path": (lambda m: pod(m)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "node's file system"),
    "writable": (lambda m: server(m)["securityContext"].update(readOnlyRootFilesystem=False), "can be written"),
    "privileges": (lambda m: server(m)["securityContext"].pop("allowPrivilegeEscalation"), "gain privileges"),
    "capabilities": (lambda m: server(m)["securityContext"]["capabilities"].update(add=["SYS_NICE"]), "capabilities"),
    "limits": (lambda m: server(m)["resources"]["limits"].pop("memory"), "no limits of memory"),
    "empty dir": (lambda m: pod(m)["volumes"][-1]["emptyDir"].pop("sizeLimit"), "has no limit"),
    "copies": (
        lambda m: next(v for v in pod(m)["volumes"] if v["name"] == "adapter-copies")["emptyDir"].update(
            sizeLimit="512Mi"
        ),
        "copies of adapters, 7.5 GiB, pass the limit of the volume at /var/cache/mtlora-adapters",
    ),
    "volumes": (
        lambda m: server(m)["resources"]["limits"].update({"ephemeral-storage": "10Gi"}),
        "volumes of 17 GiB, ephemeral storage of 10 GiB",
    ),
    "latest": (lambda m: server(m).update(image="mtlora-server:latest"), "not pinned"),
    "no tag": (lambda m: server(m).update(image="host:5000/mtlora-server"), "not pinned"),
    "liveness": (lambda m: server(m)["livenessProbe"]["grpc"].update(service=manifests.SERVICE), "livenessProbe asks"),
    "startup": (lambda m: server(m)["startupProbe"].update(failureThreshold=3), "less than five minutes"),
    "no pre-stop": (lambda m: server(m).pop("lifecycle"), "before balancers"),
    "short grace": (lambda m: pod(m).update(terminationGracePeriodSeconds=60), "is killed before its drain"),
    "deadline": (
        lambda m: one(m, "Deployment")["spec"].pop("progressDeadlineSeconds"),
        "a roll-out counts as failed after 600 s, a pod may take 900 s to start",
    ),
    "spread": (
        lambda m: pod(m)["topologySpreadConstraints"][1].pop("matchLabelKeys"),
        "old replicas count when new ones are spread over kubernetes.io/hostname",
    ),
    "name cache": (
        lambda m: one(m, "NetworkPolicy")["spec"]["egress"][0]["to"].pop(),
        "no way to kube-dns, or to NodeLocal DNSCache",
    ),
    "gpus": (lambda m: server(m)["resources"]["limits"].update({"nvidia.com/gpu": "2"}), "2 GPUs for 1 x 1"),
    "selector": (lambda m: one(m, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update(x="y"), "no pod"),
    "volume": (lambda m: pod(m)["volumes"][0]["persistentVolumeClaim"].update(claimName="lost"), "which is nowhere"),
    "network": (lambda m: one(m, "NetworkPolicy")["spec"].update(policyTypes=["Ingress"]), "a direction open"),
    "nothing": (lambda m: m.remove(one(m, "PodDisruptionBudget")), "no PodDisruptionBudget"),
}


POOL_DAMAGES: dict[str, tuple[Damage, str]] = {
    "selector": (lambda m: one(m, "InferencePool")["spec"]["selector"]["matchLabels"].update(x="y"), "selects no pod"),
    "port": (
        lambda m: one(m, "InferencePool")["spec"]["targetPorts"][0].update(number=8000),
        "other ports than gRPC's",
    ),
    "picker": (lambda m: m.remove(next(each for each in m if manifests.PICKER in each.get("data", {}))), "no config"),
    "protocol": (lambda m: one(m, "InferencePool")["spec"].pop("appProtocol"), "speaks HTTP/1.1"),
    "parser": (lambda m: rewrite(m, manifests.PICKER, "parser: {", "#"), "openai-parser of its endpoint picker cannot"),
    "metrics port": (
        lambda m: rewrite(m, manifests.PICKER_CHART, "model-server-metrics-port: 9090", "v: 2"),
        "asks port None for metrics, not [9090]",
    ),
    "labels": (
        lambda m: rewrite(m, manifests.PICKER_CHART, "component: server", "component: x"),
        "chart-values.yaml has other ports or labels",
    ),
    "labels of llm-d": (
        lambda m: rewrite(m, manifests.PICKER_CHART_LLM_D, "component: server", "component: x"),
        "chart-values-llm-d.yaml has other ports or labels",
    ),
    "configuration": (
        lambda m: rewrite(
            m, manifests.PICKER_CHART_LLM_D, "pluginsConfigFile: endpoint-picker", "pluginsConfigFile: x"
        ),
        "does not name endpoint-picker.yaml",
    ),
    "network": (
        lambda m: [each["spec"]["ingress"].clear() for each in m if each["kind"] == "NetworkPolicy"],
        "no NetworkPolicy admits pods with label llm-d-router-gateway",
    ),
    "route": (lambda m: one(m, "HTTPRoute")["spec"]["rules"].clear(), "passes the InferencePool by"),
    "kind of route": (lambda m: one(m, "HTTPRoute").update(kind="GRPCRoute"), "HTTPRoutes alone"),
    "objective": (lambda m: one(m, "InferenceObjective")["spec"]["poolRef"].update(name="x"), "which is nowhere"),
}


RAY_DAMAGES: dict[str, tuple[Damage, str]] = {
    "budget": (lambda m: m.append({"kind": "PodDisruptionBudget", "metadata": {"name": "x"}, "spec": {"selector": {
        "matchLabels": {}}}}), "allow no eviction"),
    "worker's drain": (
        lambda m: worker(m)["lifecycle"]["preStop"]["sleep"].update(seconds=60),
        "ends after 60 s, while the server drains for 71 s",
    ),
    "worker's grace": (
        lambda m: worker(m)["lifecycle"]["preStop"]["sleep"].update(seconds=85),
        "is killed before 85 + 10 s have passed",
    ),
    "worker's probe": (lambda m: worker(m).pop("livenessProbe"), "no livenessProbe, so KubeRay"),
}  # fmt: skip


def worker(found: list[dict[str, Any]]) -> dict[str, Any]:
    return one(found, "RayCluster")["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


GPU_DAMAGES: dict[str, tuple[Damage, str]] = {
    "surge": (lambda m: one(m, "Deployment")["spec"].pop("strategy"), "a roll-out needs a GPU that is free"),
}


_ALL_DAMAGES = {"cpu": DAMAGES, "pool": POOL_DAMAGES, "multi_node": RAY_DAMAGES, "gpu": GPU_DAMAGES}


@needs_kustomize
@pytest.mark.parametrize(("overlay", "name"), [(o, name) for o, damages in _ALL_DAMAGES.items() for name in damages])
def test_policy_finds_violations(overlay: str, name: str, request: pytest.FixtureRequest) -> None:
    damage, message = _ALL_DAMAGES[overlay][name]
    damaged = copy.deepcopy(request.getfixturevalue(overlay))
    damage(damaged)
    assert any(message in found for found in manifests.violations(damaged))


def check_validation(objects: list[dict[str, Any]], kind: str, damage: Damage) -> None:
    """The object of a kind is valid, and is not once it is damaged."""
    damaged = copy.deepcopy(one(objects, kind))
    assert manifests.validate(damaged) == []
    damage(damaged)
    assert manifests.validate(damaged) != []


INVALID_POOL: dict[str, tuple[str, Damage]] = {
    "port": ("InferencePool", lambda m: m["spec"]["targetPorts"][0].update(number="50051")),
    "protocol": ("InferencePool", lambda m: m["spec"].update(appProtocol="grpc")),
    "old reference": ("InferencePool", lambda m: m["spec"].update(extensionRef=m["spec"].pop("endpointPickerRef"))),
    "priority": ("InferenceObjective", lambda m: m["spec"].update(priority="high")),
    "path": ("HTTPRoute", lambda m: m["spec"]["rules"][0]["matches"][0]["path"].update(value="mtlora.v1.Inference/")),
    "backend": ("HTTPRoute", lambda m: m["spec"]["rules"][0]["backendRefs"][0].update(kind="Service")),
}


@needs_kustomize
@pytest.mark.parametrize("name", INVALID_POOL)
def test_validation_finds_errors_of_an_inference_pool(name: str, pool: list[dict[str, Any]]) -> None:
    check_validation(pool, *INVALID_POOL[name])


# What the charts make for the endpoint picker, as far as it matters here.
_CHARTED = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: mtlora-epp}
spec:
  template:
    metadata: {labels: {inferencepool: mtlora-epp}}
    spec:
      serviceAccountName: mtlora-epp
      containers: [{name: epp, image: "registry.example.com/epp:1"}]
---
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: mtlora}
"""


@needs_kustomize
def test_the_namespace_admits_the_endpoint_picker_and_the_pool_has_one_owner(
    pool: list[dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copy(manifests.OVERLAYS / "inference-pool" / "picker" / "kustomization.yaml", tmp_path)
    (tmp_path / "chart.yaml").write_text(_CHARTED)
    found = manifests.build(tmp_path)
    assert [each["kind"] for each in found] == ["Deployment"]
    assert one(pool, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    # Pod Security's level allows what is left.
    allowed = ["has a token", "would set MTLORA_PORT", "root file system can be written"]
    wrong = [*manifests._pods_are_restricted(found), *manifests._containers_are_confined(found)]
    assert [each for each in wrong if not any(text in each for text in allowed)] == []


@needs_kustomize
@pytest.mark.parametrize("text", ["weight: heavy", "pluginRef: lora-afinity-scorer", "parser: {pluginRef: openai}"])
def test_validation_finds_errors_of_an_endpoint_picker(text: str, pool: list[dict[str, Any]]) -> None:
    config = copy.deepcopy(next(each for each in pool if manifests.PICKER in each.get("data", {})))
    key = text.partition(":")[0]
    lines = config["data"][manifests.PICKER].splitlines()
    at = max(i for i, line in enumerate(lines) if line.strip(" -").startswith(key))
    lines[at] = lines[at].partition(key)[0] + text
    config["data"][manifests.PICKER] = "\n".join(lines)
    assert any(manifests.PICKER in error for error in manifests.validate(config))


INVALID: dict[str, tuple[str, Damage]] = {
    "unknown field": ("Deployment", lambda m: m["spec"].update(replica=2)),
    "wrong type": ("Service", lambda m: m["spec"]["ports"][0].update(port="http")),
    "missing": ("HorizontalPodAutoscaler", lambda m: m["spec"].pop("maxReplicas")),
    "issuer": ("Certificate", lambda m: m["spec"].pop("issuerRef")),
    "unknown in certificate": ("Certificate", lambda m: m["spec"].update(dnsName="x")),
    "endpoint": ("ServiceMonitor", lambda m: m["spec"]["endpoints"][0].update(intervall="15s")),
    "rule": ("PrometheusRule", lambda m: m["spec"]["groups"][0]["rules"][0].pop("expr")),
    "route": ("GRPCRoute", lambda m: m["spec"]["rules"][0].update(match=[])),
    "policy": ("BackendTLSPolicy", lambda m: m["spec"]["targetRefs"][0].pop("kind")),
    "authority": (
        "BackendTLSPolicy",
        lambda m: m["spec"]["validation"]["caCertificateRefs"][0].update(kind="Secret"),
    ),
}


@needs_kustomize
@pytest.mark.parametrize("name", INVALID)
def test_validation_finds_errors(name: str, cpu: list[dict[str, Any]]) -> None:
    check_validation(cpu, *INVALID[name])


@needs_kustomize
def test_validates_the_pods_of_a_ray_cluster(multi_node: list[dict[str, Any]]) -> None:
    damaged = copy.deepcopy(multi_node)
    worker(damaged)["imagee"] = "x"
    assert manifests.validate(one(damaged, "RayCluster")) != []


def test_says_how_to_install_kustomize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    assert manifests.main([]) == 2
    assert "apt-get install kustomize" in capsys.readouterr().out


@needs_kustomize
def test_the_rule_for_storage_inside_the_cluster_is_valid_without_its_comment_signs(gpu: list[dict[str, Any]]) -> None:
    file = manifests.FOLDER / "kubernetes" / "components" / "adapters-from-object-storage" / "networkpolicy.yaml"
    _, _, commented = file.read_text().partition("# - op")
    (operation,) = yaml.safe_load("- op" + commented.replace("\n# ", "\n"))
    policy = copy.deepcopy(one(gpu, "NetworkPolicy"))
    policy["spec"]["egress"].append(operation["value"])
    assert operation["path"] == "/spec/egress/-"
    assert manifests.validate(policy) == []


def test_prometheus_rule_equals_the_rules() -> None:
    assert manifests.PROMETHEUS_RULE.read_text() == manifests.prometheus_rule()
