"""Finds names in a release's sources: a wheel, an archive or a folder. Installs nothing, imports nothing."""

import ast
import functools
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mtlora.errors import MtLoRAError
from mtlora.vllm_plugin.seams import ANY, Parameter, Signature


class SourcesError(MtLoRAError):
    """Sources that cannot be read."""


class Sources:
    """The package `vllm` of a wheel (.whl), a source archive (.tar.gz) or a folder that holds it or is it."""

    def __init__(self, path: Path) -> None:
        self._read = _reader(path)
        if self._read("vllm/__init__.py") is None:
            raise SourcesError(f"{path}: contains no package vllm")

    def find(self, module: str, attribute: str) -> Signature | None:
        """A name's signature, like `seams.find_imported` in a process. Raises LookupError if there is no such name."""
        name, *rest = attribute.split(".")
        home, node = self._definition(module, name)
        for part in rest:
            home, node = self._member(home, node, part)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        decorators = {decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)}
        return _signature(node.args, bound=bool(rest) and "staticmethod" not in decorators)

    def _definition(self, module: str, name: str) -> tuple[str, ast.stmt]:
        """The module that defines a name of a module, following imports, and where it does."""
        for statement in self._statements(module):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return self._definition(self._absolute(module, statement), alias.name)
            elif _defines(statement, name):
                return module, statement
        raise LookupError(f"{module}.{name}")

    def _member(self, module: str, owner: ast.stmt, name: str) -> tuple[str, ast.stmt]:
        """A class's member, its own or inherited."""
        if not isinstance(owner, ast.ClassDef):
            raise LookupError(name)
        for statement in _flat(owner.body):
            if _defines(statement, name):
                return module, statement
        for base in owner.bases:
            if isinstance(base, ast.Name):
                try:
                    return self._member(*self._definition(module, base.id), name)
                except LookupError:
                    continue
        raise LookupError(f"{module}.{owner.name}.{name}")

    def _absolute(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        package = module.split(".")
        # A package's own file is one level deeper than its name says.
        up = statement.level - (self._read(f"{'/'.join(package)}/__init__.py") is not None)
        parts = package[: len(package) - up] + ([statement.module] if statement.module else [])
        return ".".join(parts)

    @functools.cache  # noqa: B019  (an object a command)
    def _statements(self, module: str) -> list[ast.stmt]:
        stem = module.replace(".", "/")
        text = self._read(f"{stem}.py") or self._read(f"{stem}/__init__.py")
        if text is None:
            raise LookupError(module)
        return list(_flat(ast.parse(text).body))


def _reader(path: Path) -> Callable[[str], bytes | None]:
    """Reads a file by its path below the folder that holds `vllm`; None where there is none."""
    if path.is_dir():
        root = path.parent if path.name == "vllm" and (path / "__init__.py").is_file() else path
        return lambda name: (root / name).read_bytes() if (root / name).is_file() else None
    try:
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            return lambda name: archive.read(name) if name in archive.NameToInfo else None
        with tarfile.open(path) as sources:
            # Everything in a source archive lies in one folder.
            files = {
                member.name.partition("/")[2]: extracted.read()
                for member in sources
                if member.name.endswith(".py") and (extracted := sources.extractfile(member))
            }
        return files.get
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourcesError(f"{path}: neither a wheel, a source archive nor a folder: {error}") from None


def _flat(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those inside `if` and `try` included."""
    for statement in statements:
        yield statement
        for field in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.ExceptHandler):
                yield from _flat(getattr(statement, field, []))


def _defines(statement: ast.stmt, name: str) -> bool:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return statement.name == name
        case ast.AnnAssign(target=ast.Name(id=found)):
            return found == name
        case ast.Assign(targets=targets):
            return any(isinstance(target, ast.Name) and target.id == name for target in targets)
    return False


def _signature(arguments: ast.arguments, *, bound: bool) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    parameters = [Parameter(each.arg, i >= required) for i, each in enumerate(positional)][1 if bound else 0 :]
    if not parameters and not arguments.kwonlyargs and arguments.vararg and arguments.kwarg:
        return ANY
    parameters += [Parameter(each.arg, True) for each in (arguments.vararg,) if each]
    parameters += [
        Parameter(each.arg, default is not None)
        for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    parameters += [Parameter(each.arg, True) for each in (arguments.kwarg,) if each]
    return parameters
