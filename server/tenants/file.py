"""Reads a tenants file: all YAML scalars are read as texts, so that only the fields' types decide how to parse them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from mtlora.errors import describe
from server.tenants.config import Tenant, TenantsError, TenantsFile

_MAX_FILE_BYTES = 16 << 20
# Tenants per pickle: reading one takes about a millisecond of the event loop.
TENANTS_A_PART = 100


_TAG = "tag:yaml.org,2002:"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads all scalars as texts: `id: 12345678` stays a text, and the field `expires` reports a wrong date."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(_TAG + name for name in ("null", "str", "seq", "map")))
    }


_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), ["<"])


def read_file(path: Path, replicas: int | None) -> TenantsFile:
    """Read and check a tenants file, its quotas divided if it says so. Raises TenantsError, whatever the file holds."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TenantsError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
        found = yaml.load(path.read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise TenantsError(f"{path}: not a readable YAML file: {error}") from None
    try:
        file = TenantsFile.model_validate(found)
    except ValidationError as error:
        raise TenantsError(f"{path}: {describe(error)}") from None
    except RecursionError:
        raise TenantsError(f"{path}: nested too deeply") from None
    issuers = (
        issuer.model_copy(update={"jwks": str(path.parent / keys)}) if (keys := issuer.keys_file) else issuer
        for issuer in file.issuers
    )
    try:
        tenants = file.tenants_of_replica(replicas)
    except ValueError as error:
        raise TenantsError(f"{path}: {error}") from None
    return file.model_copy(update={"tenants": tenants, "issuers": tuple(issuers)})


def read_parts(path: Path, replicas: int | None) -> Iterator[TenantsFile | tuple[Tenant, ...]]:
    """Like `read_file`, in parts: the file without tenants, then its tenants, some at a time."""
    file = read_file(path, replicas)
    yield file.model_copy(update={"tenants": ()})
    for start in range(0, len(file.tenants), TENANTS_A_PART):
        yield file.tenants[start : start + TENANTS_A_PART]
