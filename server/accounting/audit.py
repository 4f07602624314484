"""The audit log: a line for every administrative call with caller, method, adapter, peer and result.

A call that changes something gets two lines, as in Kubernetes' audit: "received" before anything is changed, and
"completed" before the caller gets the status. If the first cannot be written, the call is refused, so every change is
recorded. Other calls get only "completed".
"""

import asyncio
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from server.errors import shorten, unavailable
from server.telemetry.logs import get_logger
from server.telemetry.metrics import Metrics
from server.tenants import Tenant

logger = get_logger("audit")

STDERR = "stderr"
# Calls of these methods are logged.
AUDITED = ("/mtlora.v1.Adapters/", "/mtlora.v1.Usage/", "/inference.GRPCInferenceService/Repository")
# Methods with a "received" line: those that change something, and one whose calls may last for days.
_RECEIVED_TOO = {
    *(
        f"/mtlora.v1.Adapters/{name}"
        for name in ("Load", "Unload", "Pin", "Unpin", "Rollback", "SetWeights", "Upload", "Watch")
    ),
    *(f"/inference.GRPCInferenceService/{name}" for name in ("RepositoryModelLoad", "RepositoryModelUnload")),
}
# Limits on values copied from the request.
_MAX_TEXT, _MAX_ENTRIES, _MAX_REFUSED_ENTRIES = 256, 1000, 16


class AuditError(RuntimeError):
    """The audit log cannot be opened; the message says why."""


class AuditLog:
    """Appends to `path`, or to stderr; with None it writes nothing. No line is dropped.

    A thread writes, so that a slow disk delays only audited calls. Raises AuditError if the file cannot be opened.
    """

    def __init__(self, path: str | None, metrics: Metrics) -> None:
        self._path = None if path in (None, STDERR) else Path(str(path))
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, "audit") if path else None
        self._file = 2
        # Whether the last line is incomplete, because the disk was full.
        self._torn = False
        if self._path:
            try:
                self._file = _open(self._path)
            except OSError as error:
                raise AuditError(f"audit_log: {path}: {error}") from None

    def call(self, rpc: str, request_id: str, context: Any) -> "AuditedCall | None":
        """The lines of one call of a method in AUDITED; None if there is no log."""
        if not self._thread:
            return None
        return AuditedCall(self, rpc, {"request_id": request_id, "method": rpc[1:], "peer": context.peer()})

    async def write(self, entry: Mapping[str, Any], *, durable: bool) -> None:
        """Append a line; `durable`: wait until it is on disk. Raises OSError."""
        assert self._thread is not None
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        # Shield the write: a queued line must be written even if its caller is cancelled.
        loop = asyncio.get_running_loop()
        try:
            await asyncio.shield(loop.run_in_executor(self._thread, self._append, line, durable))
        except OSError as error:
            self._metrics.record_accounting_failure("audit")
            logger.error("audit log not written", extra={"fields": {"reason": str(error)}})
            raise

    def _append(self, line: bytes, durable: bool) -> None:
        if self._path:
            self._follow_rotation(self._path)
        if self._torn:
            line = b"\n" + line
        while line:
            written = os.write(self._file, line)
            line = line[written:]
            self._torn = bool(line)
        if self._path and durable:
            os.fsync(self._file)

    def _follow_rotation(self, path: Path) -> None:
        """Reopen the file if it was renamed or removed."""
        try:
            if os.path.samestat(os.stat(path), os.fstat(self._file)):
                return
        except FileNotFoundError:
            pass
        fresh = _open(path)
        os.close(self._file)
        self._file = fresh


class AuditedCall:
    """One call's lines."""

    def __init__(self, log: AuditLog, rpc: str, known: Mapping[str, Any]) -> None:
        self._log = log
        self._twice = rpc in _RECEIVED_TOO
        self._known = dict(known)

    async def received(self, tenant: Tenant, request: Message) -> None:
        """Write the "received" line, if the call may change something. Raises UNAVAILABLE if it cannot be written.

        Skips tenants that are not admins: their calls will be refused. One short line at the end is enough, so that a
        flood of such calls does not fill the disk.
        """
        entries = _MAX_ENTRIES if tenant.admin else _MAX_REFUSED_ENTRIES
        self._known["request"] = _shown(MessageToDict(request, preserving_proto_field_name=True), entries)
        self._twice &= tenant.admin
        if self._twice:
            try:
                await self._log.write(self._entry("received", tenant.id), durable=True)
            except OSError:
                raise unavailable("the audit log cannot be written; nothing was changed", 10.0) from None

    def chose(self, version: str) -> None:
        """Store the version that a stream is about, for its "completed" line."""
        self._known["version"] = version

    async def completed(self, tenant: str, status: str, reason: str, response: Message | None) -> None:
        """Write down what came of a call. If that fails, its status stays as it is: the server's log has the line."""
        entry = self._entry("completed", tenant) | {"status": status}
        if reason:
            entry["reason"] = shorten(reason, _MAX_TEXT)
        # The version that the call chose, if the request names none.
        if response is not None and "serving" in response.DESCRIPTOR.fields_by_name:
            entry["version"] = response.serving.version  # type: ignore[attr-defined]
        try:
            await self._log.write(entry, durable=self._twice)
        except OSError:
            logger.error("audit line not written", extra={"fields": {"line": entry}})

    def _entry(self, stage: str, tenant: str) -> dict[str, Any]:
        now = time.time()
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e3):03d}Z"
        return {"time": at, "logger": logger.name, "stage": stage, "tenant": tenant, **self._known}


def _shown(value: Any, entries: int) -> Any:
    if isinstance(value, dict):
        return {shorten(name, _MAX_TEXT): _shown(value[name], entries) for name in list(value)[:entries]}
    return shorten(value, _MAX_TEXT) if isinstance(value, str) else value


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
