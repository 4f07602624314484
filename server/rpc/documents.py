"""Keeps documents, so that tenants can send an id instead of the document again."""

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.errors import not_found
from server.settings import Settings
from server.tenants import Tenant

_MIB = 1 << 20
_TOKEN_BYTES = 4


@dataclass(frozen=True)
class Document:
    """The document part of prompts. id: a digest of its tenant and its token ids."""

    id: str
    template: str
    ids: "array[int]"
    # See GenerationJob; None for a tenant whose blocks are not kept.
    lease: tuple[float, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its ids."""
        return len(self.ids) * _TOKEN_BYTES


class Documents:
    """Keeps documents for `lifetime_s` after their last use; above its limits, a tenant's least recently used ones go.

    max_documents, max_mib, max_leased: limits of a tenant whose own entry sets none; max_leased: tokens whose blocks
    the engine keeps.
    """

    def __init__(
        self,
        lifetime_s: float,
        max_documents: int,
        max_mib: float,
        max_leased: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lifetime_s = lifetime_s
        self._max_documents, self._max_mib, self._max_leased = max_documents, max_mib, max_leased
        self._clock = clock
        # Expiry by tenant and id, least recently used first, which is also the order of expiry.
        self._until: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._held: dict[str, OrderedDict[str, Document]] = {}
        self._bytes: dict[str, int] = {}

    @classmethod
    def from_settings(cls, settings: Settings) -> "Documents":
        return cls(
            settings.document_lifetime_s,
            settings.max_documents,
            settings.max_document_mib,
            settings.max_leased_tokens,
        )

    def keep(self, tenant: Tenant, template: str, ids: Any) -> Document:
        """Keep a document, or extend its lifetime."""
        packed = array("I", ids)
        digest = hashlib.sha256(b"\0".join((tenant.id.encode(), template.encode(), packed.tobytes())))
        leased = self._max_leased if tenant.max_leased_tokens is None else tenant.max_leased_tokens
        document = Document(digest.hexdigest(), template, packed, (self._lifetime_s, leased) if leased else None)
        self._drop_expired()
        held = self._held.setdefault(tenant.id, OrderedDict())
        if document.id not in held:
            held[document.id] = document
            self._bytes[tenant.id] = self._bytes.get(tenant.id, 0) + document.num_bytes
        self._use(tenant, document.id)
        most = self._max_documents if tenant.max_documents is None else tenant.max_documents
        most_bytes = (self._max_mib if tenant.max_document_mib is None else tenant.max_document_mib) * _MIB
        while held and (len(held) > most or self._bytes[tenant.id] > most_bytes):
            self._drop(tenant.id, next(iter(held)))
        return document

    def get(self, tenant: Tenant, document_id: str) -> Document:
        """A tenant's document. Raises the same NOT_FOUND for unknown, expired and other tenants' documents."""
        self._drop_expired()
        held = self._held.get(tenant.id)
        document = held.get(document_id) if held else None
        if document is None:
            raise not_found("mtlora.v1.Document", document_id, "no such document now; send its text again")
        self._use(tenant, document_id)
        return document

    def _use(self, tenant: Tenant, document_id: str) -> None:
        self._held[tenant.id].move_to_end(document_id)
        self._until[tenant.id, document_id] = self._clock() + self._lifetime_s
        self._until.move_to_end((tenant.id, document_id))

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._until:
            key, until = next(iter(self._until.items()))
            if until > now:
                return
            self._drop(*key)

    def _drop(self, tenant_id: str, document_id: str) -> None:
        del self._until[tenant_id, document_id]
        held = self._held[tenant_id]
        self._bytes[tenant_id] -= held.pop(document_id).num_bytes
        if not held:
            del self._held[tenant_id], self._bytes[tenant_id]
