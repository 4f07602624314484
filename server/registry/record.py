"""The registry's record of one adapter; decides which of its versions should serve."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.registry.source import Found
from server.registry.version import AdapterVersion, Stage, version_key

# Number of earlier versions kept for rollbacks.
KEPT = 2


@dataclass(eq=False)
class AdapterRecord:
    """versions: all that have files in the folder or a copy in the spool.
    previous: versions kept for rollbacks, the latest last.
    canary: versions with weights, beside the serving one, by version.
    weights: by scope (a task's id, or "" for the whole adapter) and version.
    unloaded: nothing serves until a Load by name. pinned: the serving version stays in the engine.
    changing: a lock, held while the serving versions change. following: the task that follows the folder.
    """

    name: str
    versions: list[AdapterVersion] = field(default_factory=list)
    serving: AdapterVersion | None = None
    previous: list[AdapterVersion] = field(default_factory=list)
    canary: dict[str, AdapterVersion] = field(default_factory=dict)
    weights: dict[str, dict[str, int]] = field(default_factory=dict)
    unloaded: bool = False
    pinned: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    following: asyncio.Task[None] | None = None

    @property
    def found(self) -> dict[str, AdapterVersion]:
        """Versions whose files lie in the folder, by version."""
        return {version.version: version for version in self.versions if version.present}

    @property
    def active(self) -> list[AdapterVersion]:
        """Versions that new requests may use: serving and canaries."""
        return [*([self.serving] if self.serving else []), *self.canary.values()]

    def note(self, found: Mapping[str, Found]) -> list[tuple[AdapterVersion, Stage]]:
        """Update the record by the folder's versions. Returns versions that appeared (FOUND) and that VANISHED."""
        changes = []
        known = self.found
        for name, files in found.items():
            before = known.get(name)
            if before is not None:
                if before.found == files:
                    continue
                before.present = False
            # The same files may have come back.
            version = next((each for each in self.versions if each.found == files), None)
            if version is None:
                version = AdapterVersion(self, files)
                self.versions.append(version)
            version.be_present(files)
            if files.complete and not (before is not None and before.found.complete):
                changes.append((version, Stage.FOUND))
        for name in known.keys() - found.keys():
            known[name].present = known[name].passed_over = False
            changes.append((known[name], Stage.VANISHED))
        self.versions = [version for version in self.versions if version.present or version.copied]
        return changes

    def candidate(self) -> AdapterVersion | None:
        """The version that should replace the serving one: the highest that neither FAILED nor was passed over.

        None while weights split the adapter, or while it is unloaded. A version below the serving one never starts to
        serve by itself, even if the serving version's folder vanishes.
        """
        if self.unloaded or self.weights:
            return None
        for version in sorted(self.found.values(), key=lambda each: version_key(each.version), reverse=True):
            if self.serving is version:
                return None
            if self.serving and version_key(version.version) < version_key(self.serving.version):
                return None
            if version.found.complete and version.stage is not Stage.FAILED and not version.passed_over:
                return version
        return None

    def serve(self, version: AdapterVersion) -> list[AdapterVersion]:
        """Make a version the serving one. Returns versions that are no longer kept for rollbacks."""
        self.canary.pop(version.version, None)
        if self.serving is version:
            return []
        self.previous = [each for each in self.previous if each is not version]
        dropped = self.stop()
        self.serving = version
        return dropped

    def stop(self) -> list[AdapterVersion]:
        """Stop serving; keep the version only for rollbacks. Returns versions that are no longer kept."""
        if self.serving is not None:
            self.previous.append(self.serving)
        self.serving = None
        dropped, self.previous = self.previous[:-KEPT], self.previous[-KEPT:]
        return dropped

    def pass_over_above(self, version: str) -> None:
        """Pass over every version above this one: only versions published later start to serve by themselves."""
        for each in self.found.values():
            if version_key(each.version) > version_key(version):
                each.passed_over = True

    def version_of(self, version: str) -> AdapterVersion | None:
        """The active version of that name."""
        if self.serving is not None and self.serving.version == version:
            return self.serving
        return self.canary.get(version)
