"""Tenants files of a server that is measured or tested."""

import os
from pathlib import Path
from typing import Any

import yaml

from server.tenants.keys import new_key


def tenant(tenant_id: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """(API key, entry) of a tenant; `fields` are added to the entry."""
    key, key_id, hashed = new_key()
    return key, {"id": tenant_id, "api_keys": [{"id": key_id, "hash": hashed}], **fields}


def write_tenants(path: Path, *entries: dict[str, Any], **fields: Any) -> Path:
    """Write the file, or replace it in one step, as an editor or a ConfigMap does."""
    fresh = path.with_suffix(".new")
    fresh.write_text(yaml.safe_dump({"tenants": list(entries), **fields}))
    os.replace(fresh, path)
    return path
