"""Models of custom resources without a published schema. They allow only the fields that our manifests use."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Resource(BaseModel):
    kind: str
    metadata: dict[str, Any]


class _Reference(_Strict):
    group: str
    kind: str
    name: str


class _ParentRef(_Strict):
    name: str
    namespace: str | None = None
    sectionName: str | None = None


class _MethodMatch(_Strict):
    service: str | None = None
    method: str | None = None


class _RouteMatch(_Strict):
    method: _MethodMatch


class _BackendRef(_Strict):
    """A Service with its port, or an InferencePool, which has ports of its own."""

    group: str = ""
    kind: str = "Service"
    name: str
    port: StrictInt | None = None

    @model_validator(mode="after")
    def _kind_has_a_port(self) -> Self:
        allowed = {("", "Service"): True, ("inference.networking.k8s.io", "InferencePool"): False}
        if allowed.get((self.group, self.kind)) is not (self.port is not None):
            raise ValueError("a backend of kind Service needs a port, one of kind InferencePool must not have one")
        return self


class _RouteRule(_Strict):
    matches: list[_RouteMatch]
    backendRefs: list[_BackendRef]


class _GRPCRouteSpec(_Strict):
    parentRefs: list[_ParentRef]
    hostnames: list[str]
    rules: list[_RouteRule]


class GRPCRoute(_Resource):
    """A route of the Gateway API."""

    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    spec: _GRPCRouteSpec


class _PathMatch(_Strict):
    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    value: str = Field(pattern="^/")


class _HTTPRouteMatch(_Strict):
    path: _PathMatch


class _HTTPRouteRule(_Strict):
    matches: list[_HTTPRouteMatch]
    backendRefs: list[_BackendRef]


class _HTTPRouteSpec(_Strict):
    parentRefs: list[_ParentRef]
    hostnames: list[str]
    rules: list[_HTTPRouteRule]


class HTTPRoute(_Resource):
    """A route of the Gateway API by paths."""

    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    spec: _HTTPRouteSpec


class _Port(_Strict):
    number: StrictInt


class _Labels(_Strict):
    matchLabels: dict[str, str]


class _EndpointPickerRef(_Strict):
    name: str
    port: _Port
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"


class _InferencePoolSpec(_Strict):
    selector: _Labels
    targetPorts: list[_Port] = Field(min_length=1, max_length=8)
    appProtocol: Literal["http", "kubernetes.io/h2c"] = "http"
    endpointPickerRef: _EndpointPickerRef


class InferencePool(_Resource):
    """Pods among which an endpoint picker of the Gateway API's inference extension chooses."""

    apiVersion: Literal["inference.networking.k8s.io/v1"]
    spec: _InferencePoolSpec


class _PoolRef(_Strict):
    name: str


class _InferenceObjectiveSpec(_Strict):
    priority: StrictInt
    poolRef: _PoolRef


class InferenceObjective(_Resource):
    """How urgent requests are that name it."""

    apiVersion: Literal["inference.networking.x-k8s.io/v1alpha2"]
    spec: _InferenceObjectiveSpec


class _Plugin(_Strict):
    type: str


class _ProfilePlugin(_Strict):
    pluginRef: str
    weight: StrictInt | None = None


class _Profile(_Strict):
    name: str
    plugins: list[_ProfilePlugin]


class _PluginRef(_Strict):
    pluginRef: str


class EndpointPickerConfig(_Strict):
    """The file that configures an endpoint picker: its plugins, their weights in a profile, what reads requests."""

    apiVersion: Literal["inference.networking.x-k8s.io/v1alpha1"]
    kind: Literal["EndpointPickerConfig"]
    plugins: list[_Plugin]
    schedulingProfiles: list[_Profile]
    parser: _PluginRef | None = None

    @model_validator(mode="after")
    def _references_name_plugins(self) -> Self:
        known = {plugin.type for plugin in self.plugins}
        named = {each.pluginRef for profile in self.schedulingProfiles for each in profile.plugins}
        if unknown := (named | ({self.parser.pluginRef} if self.parser else set())) - known:
            raise ValueError(f"pluginRef: found {sorted(unknown)}; allowed: {sorted(known)}")
        return self


class _AuthorityRef(_Strict):
    """A ConfigMap with ca.crt. Gateways need not know other kinds."""

    group: Literal[""]
    kind: Literal["ConfigMap"]
    name: str


class _TLSValidation(_Strict):
    hostname: str
    caCertificateRefs: list[_AuthorityRef]


class _BackendTLSPolicySpec(_Strict):
    targetRefs: list[_Reference]
    validation: _TLSValidation


class BackendTLSPolicy(_Resource):
    """How a gateway of the Gateway API speaks TLS to its backends."""

    spec: _BackendTLSPolicySpec


class _RayGroup(_Strict):
    rayStartParams: dict[str, StrictStr]
    # A pod template is validated by Kubernetes' own schema.
    template: dict[str, Any]


class _HeadGroup(_RayGroup):
    serviceType: str


class _WorkerGroup(_RayGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int

    @model_validator(mode="after")
    def _replicas_are_within_their_bounds(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("replicas lie between minReplicas and maxReplicas")
        return self


class _RayClusterSpec(_Strict):
    rayVersion: str
    enableInTreeAutoscaling: bool
    headGroupSpec: _HeadGroup
    workerGroupSpecs: list[_WorkerGroup]


class RayCluster(_Resource):
    """A cluster of KubeRay."""

    spec: _RayClusterSpec
