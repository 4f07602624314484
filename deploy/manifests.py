"""`make manifests`: build every overlay, validate its manifests, check them against the policy.

Validated against schemas: Kubernetes' own kinds (kubernetes-validate, strictly: unknown fields are errors),
cert-manager's and the Prometheus operator's (models generated from their own definitions). No package carries those of
the Gateway API, its inference extension and KubeRay; schemas.py has the fields of those that are in use.

With --write-rules, first write prometheusrule.yaml from rules.yaml.
"""

import argparse
import importlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

Manifest = dict[str, Any]

FOLDER = Path(__file__).parent
OVERLAYS = FOLDER / "kubernetes" / "overlays"
RULES = FOLDER / "prometheus" / "rules.yaml"
PROMETHEUS_RULE = FOLDER / "prometheus" / "prometheusrule.yaml"
KUBERNETES_VERSION = "1.34"
# Seconds after the grace period in which the server aborts the remaining requests and stops the engine.
_STOP_SECONDS = 10
SERVICE = "mtlora.v1.Inference"
# Keys of the ConfigMap that configures an InferencePool's endpoint picker: its configuration, and the values of its
# chart, which is the Gateway API inference extension's or llm-d's.
PICKER = "endpoint-picker.yaml"
PICKER_CHART = "chart-values.yaml"
PICKER_CHART_LLM_D = "chart-values-llm-d.yaml"
# Labels that the charts give to the picker's pods; their value is the name of its Service.
_PICKER_LABELS = ("inferencepool", "llm-d-router-gateway")


@dataclass(frozen=True)
class Container:
    """A container, with its pod and the name of its place."""

    where: str
    pod: Manifest
    spec: Manifest
    init: bool


def build(overlay: Path) -> list[Manifest]:
    """The overlay's manifests, by kustomize or kubectl. Raises RuntimeError with kustomize's message."""
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{overlay.name}: {done.stderr.strip()}")
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def validate(manifest: Manifest) -> list[str]:
    """The errors of a manifest by the schema of its kind."""
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    group = manifest["apiVersion"].partition("/")[0] if "/" in manifest["apiVersion"] else ""
    module = _MODELS.get((group, manifest["kind"]))
    found = list(_by_model(module, manifest) if module else _by_schema(manifest))
    if picker := manifest.get("data", {}).get(PICKER):
        found += [f"{PICKER}: {error}" for error in _by_model("deploy.schemas", yaml.safe_load(picker))]
    if manifest["kind"] == "RayCluster" and not found:
        for template in _pod_templates(manifest).values():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
            found += _by_schema({**pod, "spec": template["spec"]})
    return [f"{name}: {each}" for each in found]


def _by_schema(manifest: Manifest) -> Iterator[str]:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"no schema for {manifest['apiVersion']} in Kubernetes {KUBERNETES_VERSION}"


def _by_model(module: str, manifest: Manifest) -> Iterator[str]:
    # Import late: the operators' models are large.
    model = getattr(importlib.import_module(module), manifest["kind"])
    try:
        parsed = model.model_validate(manifest)
    except ValidationError as error:
        yield from (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return
    kept = parsed.model_dump(mode="json", by_alias=True, exclude_none=True)
    yield from _lost(manifest.get("spec"), kept.get("spec"), "spec")


def _lost(given: Any, kept: Any, where: str) -> Iterator[str]:
    """Fields that a model dropped because it does not know them."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{where}.{key}: no such field"
            else:
                yield from _lost(value, kept[key], f"{where}.{key}")
    elif isinstance(given, list) and isinstance(kept, list):
        for i, (a, b) in enumerate(zip(given, kept, strict=False)):
            yield from _lost(a, b, f"{where}.{i}")


_MODELS = {
    ("cert-manager.io", "Certificate"): "cloudcoil.models.cert_manager.v1",
    ("cert-manager.io", "Issuer"): "cloudcoil.models.cert_manager.v1",
    ("monitoring.coreos.com", "ServiceMonitor"): "cloudcoil.models.prometheus_operator.v1",
    ("monitoring.coreos.com", "PrometheusRule"): "cloudcoil.models.prometheus_operator.v1",
    ("gateway.networking.k8s.io", "GRPCRoute"): "deploy.schemas",
    ("gateway.networking.k8s.io", "HTTPRoute"): "deploy.schemas",
    ("gateway.networking.k8s.io", "BackendTLSPolicy"): "deploy.schemas",
    ("inference.networking.k8s.io", "InferencePool"): "deploy.schemas",
    ("inference.networking.x-k8s.io", "InferenceObjective"): "deploy.schemas",
    ("ray.io", "RayCluster"): "deploy.schemas",
}


def containers(manifests: Sequence[Manifest]) -> list[Container]:
    """Every container of every pod template."""
    found = []
    for where, pod in pods(manifests):
        for key in ("initContainers", "containers"):
            found += [Container(f"{where}/{c['name']}", pod, c, key != "containers") for c in pod.get(key, ())]
    return found


def pods(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(where, pod spec) of every pod template."""
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        for suffix, template in _pod_templates(manifest).items():
            yield f"{name}{suffix}", template["spec"]


def _pod_templates(manifest: Manifest) -> dict[str, Manifest]:
    """A manifest's pod templates by a suffix for their names."""
    spec = manifest.get("spec") or {}
    if manifest["kind"] == "RayCluster":
        workers = {f"-{group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
        return {"-head": spec["headGroupSpec"]["template"], **workers}
    return {"": spec["template"]} if "template" in spec else {}


def server_settings(manifests: Sequence[Manifest]) -> dict[str, str]:
    """The server's environment."""
    return next(
        m["data"] for m in manifests if m["kind"] == "ConfigMap" and m["metadata"]["name"].startswith("mtlora-server")
    )


def violations(manifests: Sequence[Manifest]) -> list[str]:
    """Where a built overlay breaks the policy."""
    return [found for rule in POLICY for found in rule(manifests)]


def _pods_are_restricted(manifests: Sequence[Manifest]) -> Iterator[str]:
    for where, pod in pods(manifests):
        context = pod.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{where}: runs as root, or without a user"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{where}: no seccomp profile"
        if pod.get("automountServiceAccountToken") is not False or pod.get("serviceAccountName") in (None, "default"):
            yield f"{where}: has a token, or the default service account"
        if pod.get("enableServiceLinks") is not False:
            yield f"{where}: Service mtlora would set MTLORA_PORT"
        if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{where}: shares a namespace of the node"
        if any("hostPath" in volume for volume in pod.get("volumes", ())):
            yield f"{where}: mounts the node's file system"


def _containers_are_confined(manifests: Sequence[Manifest]) -> Iterator[str]:
    for container in containers(manifests):
        context = container.spec.get("securityContext", {})
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{container.where}: root file system can be written"
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged", False):
            yield f"{container.where}: may gain privileges"
        if context.get("capabilities", {}).get("drop") != ["ALL"] or context["capabilities"].get("add"):
            yield f"{container.where}: keeps capabilities"


def _resources_are_bounded(manifests: Sequence[Manifest]) -> Iterator[str]:
    for container in containers(manifests):
        resources = container.spec.get("resources", {})
        for kind in ("requests", "limits"):
            for what in ("cpu", "memory", "ephemeral-storage"):
                if what not in resources.get(kind, {}):
                    yield f"{container.where}: no {kind} of {what}"
    for where, pod in pods(manifests):
        for volume in pod.get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{where}: volume {volume['name']} has no limit"


def _volumes_fit(manifests: Sequence[Manifest]) -> Iterator[str]:
    """The kubelet evicts a pod that passes a volume's limit, or its containers' limit of ephemeral storage."""
    settings = server_settings(manifests)
    folder, copies_gib = settings["MTLORA_ADAPTER_CACHE"], float(settings["MTLORA_ADAPTER_CACHE_GIB"])
    for container in _servers(manifests):
        mounted = {mount["mountPath"]: mount["name"] for mount in container.spec["volumeMounts"]}
        limits = {name: _gib(limit) for name, limit in _disk_limits(container.pod)}
        if limits.get(mounted.get(folder, ""), 0.0) <= copies_gib:
            yield f"{container.where}: copies of adapters, {copies_gib:g} GiB, pass the limit of the volume at {folder}"
    for where, pod in pods(manifests):
        allowed = [
            sum(_gib(each["resources"]["limits"]["ephemeral-storage"]) for each in together)
            for together in (pod["containers"], *([each] for each in pod.get("initContainers", ())))
        ]
        if (total := sum(_gib(limit) for _, limit in _disk_limits(pod))) > max(allowed):
            yield f"{where}: volumes of {total:g} GiB, ephemeral storage of {max(allowed):g} GiB"


def _disk_limits(pod: Manifest) -> Iterator[tuple[str, str]]:
    for volume in pod.get("volumes", ()):
        if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory":
            yield volume["name"], volume["emptyDir"].get("sizeLimit", "0Gi")


def _gib(quantity: str) -> float:
    return float(quantity.removesuffix("Gi")) if quantity.endswith("Gi") else float(quantity.removesuffix("Mi")) / 1024


def _images_are_pinned(manifests: Sequence[Manifest]) -> Iterator[str]:
    for container in containers(manifests):
        image = container.spec["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and (not tag or tag == "latest"):
            yield f"{container.where}: image {image} is not pinned"


def _probes_fit(manifests: Sequence[Manifest]) -> Iterator[str]:
    health = int(server_settings(manifests)["MTLORA_HEALTH_PORT"])
    for container in _servers(manifests):
        wanted = {"startupProbe": SERVICE, "readinessProbe": SERVICE, "livenessProbe": "live"}
        for probe, service in wanted.items():
            grpc = container.spec.get(probe, {}).get("grpc")
            if grpc != {"port": health, "service": service}:
                yield f"{container.where}: {probe} asks {grpc}, not {service} on {health}"
        if _startup_seconds(container) < 300:
            yield f"{container.where}: startup has less than five minutes"
    for container in containers([manifest for manifest in manifests if manifest["kind"] == "RayCluster"]):
        for probe in {"readinessProbe", "livenessProbe"} - container.spec.keys():
            yield f"{container.where}: no {probe}, so KubeRay adds its own, which needs wget"


def _startup_seconds(container: Container) -> int:
    probe = container.spec.get("startupProbe", {})
    return int(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))


def _roll_outs_go_on(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A Deployment waits as long as a pod may start, and needs no GPU that its pods do not have already."""
    for deployment in (m for m in manifests if m["kind"] == "Deployment"):
        name, spec = deployment["metadata"]["name"], deployment["spec"]
        servers = _servers([deployment])
        deadline = spec.get("progressDeadlineSeconds", 600)
        if (startup := max(map(_startup_seconds, servers), default=0)) >= deadline:
            yield f"{name}: a roll-out counts as failed after {deadline} s, a pod may take {startup} s to start"
        gpus = any("nvidia.com/gpu" in each.spec["resources"]["limits"] for each in servers)
        if gpus and spec.get("strategy", {}).get("rollingUpdate", {}).get("maxSurge", "25%") != 0:
            yield f"{name}: a roll-out needs a GPU that is free"
        for constraint in spec["template"]["spec"].get("topologySpreadConstraints", ()):
            if constraint.get("matchLabelKeys") != ["pod-template-hash"]:
                yield f"{name}: old replicas count when new ones are spread over {constraint['topologyKey']}"


def _drains_end(manifests: Sequence[Manifest]) -> Iterator[str]:
    settings = server_settings(manifests)
    grace = float(settings["MTLORA_GRACE_PERIOD_S"]) + float(settings.get("MTLORA_DRAIN_DELAY_S", 1))
    servers = _servers(manifests)
    for container in servers:
        wait = _pre_stop_seconds(container)
        if wait < 5:
            yield f"{container.where}: SIGTERM comes before balancers have stopped sending"
        if container.pod.get("terminationGracePeriodSeconds", 30) < wait + grace + _STOP_SECONDS:
            yield f"{container.where}: is killed before its drain of {wait} + {grace:g} + {_STOP_SECONDS} s ends"
    drain = max((_pre_stop_seconds(each) + grace for each in servers), default=0)
    for container in containers([m for m in manifests if m["kind"] == "RayCluster"]):
        # Ranks run in the workers too.
        if not _is_server(container) and not container.init:
            wait = _pre_stop_seconds(container)
            if wait < drain:
                yield f"{container.where}: ends after {wait} s, while the server drains for {drain:g} s"
            if container.pod.get("terminationGracePeriodSeconds", 30) < wait + _STOP_SECONDS:
                yield f"{container.where}: is killed before {wait} + {_STOP_SECONDS} s have passed"


def _pre_stop_seconds(container: Container) -> int:
    return int(container.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0))


def _names_resolve(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Pods may ask the cluster's DNS, and a node's own cache of it."""
    cache = {"ipBlock": {"cidr": "169.254.20.10/32"}}
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    dns = [
        rule["to"]
        for policy in policies
        for rule in policy.get("egress", ())
        if {("UDP", 53), ("TCP", 53)} <= {(port["protocol"], port["port"]) for port in rule.get("ports", ())}
    ]
    if not any("podSelector" in peer for to in dns for peer in to) or not any(cache in to for to in dns):
        yield "NetworkPolicy: no way to kube-dns, or to NodeLocal DNSCache at 169.254.20.10"


def _ranks_have_their_gpus(manifests: Sequence[Manifest]) -> Iterator[str]:
    settings = server_settings(manifests)
    tensor, pipeline = (int(settings.get(f"MTLORA_{k}_PARALLEL_SIZE", 1)) for k in ("TENSOR", "PIPELINE"))
    gpus = [int(c.spec["resources"]["limits"].get("nvidia.com/gpu", 0)) for c in containers(manifests) if not c.init]
    if sum(gpus) and sum(gpus) != tensor * pipeline:
        yield f"{sum(gpus)} GPUs for {tensor} x {pipeline} ranks"
    if not sum(gpus) and tensor * pipeline > 1:
        yield f"{tensor} x {pipeline} ranks without a GPU"


def _services_select_servers(manifests: Sequence[Manifest]) -> Iterator[str]:
    labels = [each["metadata"]["labels"] for manifest in manifests for each in _pod_templates(manifest).values()]
    for manifest in manifests:
        if manifest["kind"] == "Service":
            selector = manifest["spec"]["selector"]
        elif manifest["kind"] == "PodDisruptionBudget":
            selector = manifest["spec"]["selector"]["matchLabels"]
        else:
            continue
        if not any(selector.items() <= each.items() for each in labels):
            yield f"{manifest['kind']} {manifest['metadata']['name']}: selects no pod"
    headless = [m for m in manifests if m["kind"] == "Service" and m["spec"].get("clusterIP") == "None"]
    if not any(port["port"] == 50051 for m in headless for port in m["spec"]["ports"]):
        yield "no headless Service for clients that balance themselves"


def _routers_find_the_pods(manifests: Sequence[Manifest]) -> Iterator[str]:
    """An InferencePool selects the servers' pods and their port; routes and objectives name one that is there."""
    pools = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "InferencePool"}
    labels = [each["metadata"]["labels"] for m in manifests for each in _pod_templates(m).values()]
    ports = {port["containerPort"] for c in _servers(manifests) for port in c.spec["ports"] if port["name"] == "grpc"}
    for name, pool in pools.items():
        if not any(pool["selector"]["matchLabels"].items() <= each.items() for each in labels):
            yield f"InferencePool {name}: selects no pod"
        if {port["number"] for port in pool["targetPorts"]} != ports:
            yield f"InferencePool {name}: has other ports than gRPC's, {sorted(ports)}"
        if pool.get("appProtocol") != "kubernetes.io/h2c":
            yield f"InferencePool {name}: a gateway speaks HTTP/1.1 to its pods, which serve gRPC"
        pickers = [m["data"] for m in manifests if PICKER in m.get("data", {})]
        if not pickers:
            yield f"InferencePool {name}: no configuration of its endpoint picker"
        for picker in pickers:
            yield from _picker_reads_the_pods(name, pool, picker, manifests)
    for manifest in manifests:
        wanted = []
        if manifest["kind"] == "InferenceObjective":
            wanted = [manifest["spec"]["poolRef"]["name"]]
        elif manifest["kind"] in ("GRPCRoute", "HTTPRoute"):
            refs = [ref for rule in manifest["spec"]["rules"] for ref in rule["backendRefs"]]
            wanted = [ref["name"] for ref in refs if ref.get("kind") == "InferencePool"]
            if pools and not wanted:
                yield f"{manifest['kind']} {manifest['metadata']['name']}: passes the InferencePool by"
            if wanted and manifest["kind"] == "GRPCRoute":
                yield f"GRPCRoute {manifest['metadata']['name']}: gateways take HTTPRoutes alone for a pool"
        for each in set(wanted) - pools.keys():
            yield f"{manifest['kind']} {manifest['metadata']['name']}: names InferencePool {each}, which is nowhere"


def _picker_reads_the_pods(
    name: str, pool: Manifest, picker: Mapping[str, str], manifests: Sequence[Manifest]
) -> Iterator[str]:
    """The endpoint picker passes protobuf on unread, and finds the pods' metrics."""
    parser = yaml.safe_load(picker[PICKER]).get("parser", {}).get("pluginRef", "openai-parser")
    if parser != "passthrough-parser":
        yield f"InferencePool {name}: {parser} of its endpoint picker cannot read protobuf"
    ports = {p["containerPort"] for c in _servers(manifests) for p in c.spec["ports"] if p["name"] == "metrics"}
    for file, configured, target_ports, labels in _charted(picker):
        asked = configured.get("flags", {}).get("model-server-metrics-port")
        if {asked} != ports:
            yield f"InferencePool {name}: {file} asks port {asked} for metrics, not {sorted(ports)}"
        if configured.get("pluginsConfigFile") != PICKER:
            yield f"InferencePool {name}: {file} does not name {PICKER}"
        if target_ports != pool["targetPorts"] or labels != pool["selector"]["matchLabels"]:
            yield f"InferencePool {name}: {file} has other ports or labels"
    for label in _PICKER_LABELS:
        selector = {"matchLabels": {label: pool["endpointPickerRef"]["name"]}}
        if not any(_admits(m, selector, port) for m in manifests if m["kind"] == "NetworkPolicy" for port in ports):
            yield f"InferencePool {name}: no NetworkPolicy admits pods with label {label} to the metrics"


def _charted(picker: Mapping[str, str]) -> Iterator[tuple[str, Manifest, Any, Any]]:
    """A chart's file of values, and in it what configures the picker, the pods' ports, the pods' labels."""
    extension, llm_d = (yaml.safe_load(picker.get(file, "{}")) for file in (PICKER_CHART, PICKER_CHART_LLM_D))
    pool, router = extension.get("inferencePool", {}), llm_d.get("router", {})
    for file, configured, servers in (
        (PICKER_CHART, extension.get("inferenceExtension", {}), {**pool, **pool.get("modelServers", {})}),
        (PICKER_CHART_LLM_D, router.get("epp", {}), router.get("modelServers", {})),
    ):
        yield file, configured, servers.get("targetPorts"), servers.get("matchLabels")


def _admits(policy: Manifest, selector: Manifest, port: int) -> bool:
    """Whether a NetworkPolicy lets pods of this selector, in its namespace, connect to the port."""
    return any(
        {"podSelector": selector} in rule["from"] and port in (each["port"] for each in rule["ports"])
        for rule in policy["spec"]["ingress"]
    )


def _names_are_found(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every object that a pod names is in the overlay, or is a secret that the operator creates."""
    brought = {"mtlora-tenants", "mtlora-object-storage", "mtlora-tls"}
    made = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for where, pod in pods(manifests):
        named = [("ServiceAccount", pod["serviceAccountName"])]
        for volume in pod.get("volumes", ()):
            if "persistentVolumeClaim" in volume:
                named.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            if "secret" in volume:
                named.append(("Secret", volume["secret"]["secretName"]))
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            for source in container.get("envFrom", ()):
                named += [("ConfigMap", source[k]["name"]) for k in ("configMapRef",) if k in source]
                named += [("Secret", source[k]["name"]) for k in ("secretRef",) if k in source]
        for kind, name in named:
            if (kind, name) not in made and not (kind == "Secret" and name in brought):
                yield f"{where}: names {kind} {name}, which is nowhere"


def _everything_is_there(manifests: Sequence[Manifest]) -> Iterator[str]:
    kinds = {m["kind"] for m in manifests}
    wanted = {
        "Namespace", "ServiceAccount", "Service", "NetworkPolicy", "ServiceMonitor", "PrometheusRule", "Certificate",
        "HTTPRoute" if "InferencePool" in kinds else "GRPCRoute", "ConfigMap",
    }  # fmt: skip
    if "RayCluster" not in kinds:
        wanted |= {"StatefulSet" if "StatefulSet" in kinds else "Deployment"}
        wanted |= {"HorizontalPodAutoscaler", "PodDisruptionBudget"}
    elif "PodDisruptionBudget" in kinds:
        yield "PodDisruptionBudget: a RayCluster has no scale, so it would allow no eviction"
    for kind in sorted(wanted - kinds):
        yield f"no {kind}"
    for manifest in manifests:
        if manifest["kind"] == "NetworkPolicy" and len(manifest["spec"]["policyTypes"]) != 2:
            yield "NetworkPolicy: leaves a direction open"
        pod = manifest["spec"]["template"]["spec"] if manifest["kind"] in ("Deployment", "StatefulSet") else None
        if pod is not None and not pod.get("topologySpreadConstraints"):
            yield f"{manifest['metadata']['name']}: replicas may share a node"


POLICY: tuple[Callable[[Sequence[Manifest]], Iterator[str]], ...] = (
    _everything_is_there,
    _pods_are_restricted,
    _containers_are_confined,
    _resources_are_bounded,
    _volumes_fit,
    _images_are_pinned,
    _probes_fit,
    _roll_outs_go_on,
    _names_resolve,
    _drains_end,
    _ranks_have_their_gpus,
    _services_select_servers,
    _routers_find_the_pods,
    _names_are_found,
)


def _servers(manifests: Sequence[Manifest]) -> list[Container]:
    """Containers that run the server: they have a port named grpc."""
    return [container for container in containers(manifests) if _is_server(container)]


def _is_server(container: Container) -> bool:
    return any(port["name"] == "grpc" for port in container.spec.get("ports", ()))


def prometheus_rule() -> str:
    """prometheusrule.yaml: rules.yaml as the Prometheus operator takes it."""
    head = (
        "# Made from rules.yaml: python -m deploy.manifests --write-rules\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: mtlora\n"
        "  labels:\n    app.kubernetes.io/name: mtlora\nspec:\n"
    )
    lines = [line for line in RULES.read_text().splitlines() if not line.startswith("#")]
    return head + "".join(f"  {line}\n" if line else "\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print every finding and a summary line; return 0 if every overlay is valid and meets the policy."""
    parser = argparse.ArgumentParser(prog="python -m deploy.manifests", description=__doc__)
    parser.add_argument("--write-rules", action="store_true", help="write prometheusrule.yaml first")
    options = parser.parse_args(argv)
    if options.write_rules:
        PROMETHEUS_RULE.write_text(prometheus_rule())
    overlays = sorted(path.parent for path in OVERLAYS.glob("*/kustomization.yaml"))
    if not shutil.which("kustomize") and not shutil.which("kubectl"):
        print(
            "manifests: kustomize is not installed: apt-get install kustomize (Debian 13, Ubuntu 24.10 and later), or "
            "https://kubectl.docs.kubernetes.io/installation/kustomize/"
        )
        return 2
    valid, broken = 0, 0
    for overlay in overlays:
        try:
            manifests = build(overlay)
        except RuntimeError as error:
            print(error)
            broken += 1
            continue
        wrong = [found for manifest in manifests for found in validate(manifest)]
        unmet = violations(manifests)
        print(f"{overlay.name}: {len(manifests)} manifests, {len(wrong)} errors, {len(unmet)} violations")
        for found in (*wrong, *unmet):
            print(f"  {found}")
        valid += not wrong
        broken += bool(unmet)
    if PROMETHEUS_RULE.read_text() != prometheus_rule():
        print("prometheusrule.yaml is not rules.yaml: python -m deploy.manifests --write-rules")
        broken += 1
    print(f"manifests: {len(overlays)} overlays, {valid} valid, policy {'met' if not broken else 'NOT met'}")
    return int(broken > 0 or valid < len(overlays))


if __name__ == "__main__":
    raise SystemExit(main())
