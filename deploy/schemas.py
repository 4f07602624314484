"""Models of custom resources without a published schema. They allow only the fields that our manifests use."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, model_validator


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
    name: str
    port: StrictInt


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


class _TLSValidation(_Strict):
    hostname: str
    caCertificateRefs: list[_Reference]


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
