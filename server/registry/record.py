"""What the registry knows of one adapter, and which version it should serve."""

from dataclasses import dataclass, field

from server.registry.source import Found, Signature
from server.registry.version import AdapterVersion, version_key

# How many versions that served before can be rolled back to.
KEPT = 2


@dataclass
class AdapterRecord:
    """found: by version, what lies in the folder.
    refused: by version, the signature that failed and why; another signature gets another try.
    passed_over: by version, the signature that somebody chose not to serve, by Rollback or by Load of a lower one.
    canary: versions that have weights, beside the one that serves.
    weights: by scope (a task's id, or "" for the whole adapter) and version.
    """

    name: str
    found: dict[str, Found] = field(default_factory=dict)
    serving: AdapterVersion | None = None
    serving_signature: Signature = ()
    previous: list[AdapterVersion] = field(default_factory=list)
    canary: dict[str, AdapterVersion] = field(default_factory=dict)
    weights: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: dict[str, tuple[Signature, str]] = field(default_factory=dict)
    passed_over: dict[str, Signature] = field(default_factory=dict)
    unloaded: bool = False
    pinned: bool = False

    def candidate(self) -> Found | None:
        """What should serve and does not: the highest version that was neither refused nor passed over.

        Nothing while somebody holds the adapter by weights or unloaded it. A version below the serving one never comes
        by itself: where the serving version's folder vanishes, it serves on.
        """
        if self.unloaded or self.weights:
            return None
        for found in sorted(self.found.values(), key=lambda each: version_key(each.version), reverse=True):
            if self.serving and version_key(found.version) < version_key(self.serving.version):
                return None
            if self.serving and found.version == self.serving.version and found.signature == self.serving_signature:
                return None
            refused = self.refused.get(found.version, ((), ""))[0] == found.signature
            if found.complete and not refused and self.passed_over.get(found.version) != found.signature:
                return found
        return None

    def serve(self, version: AdapterVersion, signature: Signature) -> list[AdapterVersion]:
        """Let a version serve; those that can no longer be rolled back to."""
        if self.serving is not None:
            self.previous.append(self.serving)
        self.serving, self.serving_signature = version, signature
        self.previous = [each for each in self.previous if each is not version]
        self.canary.pop(version.version, None)
        dropped, self.previous = self.previous[:-KEPT], self.previous[-KEPT:]
        return dropped

    def pass_over_above(self, version: str) -> None:
        """Leave every version above this one that is here now: only what comes later replaces it by itself."""
        for found in self.found.values():
            if version_key(found.version) > version_key(version):
                self.passed_over[found.version] = found.signature

    def version_of(self, version: str) -> AdapterVersion | None:
        """The version of that name that serves or has weights."""
        if self.serving is not None and self.serving.version == version:
            return self.serving
        return self.canary.get(version)

    @property
    def active(self) -> list[AdapterVersion]:
        """Versions that new requests may begin on."""
        return [*([self.serving] if self.serving else []), *self.canary.values()]
