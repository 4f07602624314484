"""`mtlora-server`: serve (the default), ask, tasks, adapters, demo, new-key. Imports are as late as can be."""

import argparse
import gc
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.cli.adapters import add_adapters, run_action

_COMMANDS = ("serve", "ask", "tasks", "adapters", "demo", "new-key")
_DEFAULT_ADDRESS = "127.0.0.1:50051"
_KEY_VARIABLE = "MTLORA_API_KEY"

# Importing vLLM makes millions of objects that stay, and Python would look through them for garbage all the while: a
# fifth of the time to import. The engine's processes import this module first, so this goes for them too.
gc.set_threshold(50_000, 20, 20)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong use."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0] not in _COMMANDS and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "serve")
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    from mtlora import __version__

    parser = argparse.ArgumentParser(
        "mtlora-server", description="Many tasks from one frozen backbone, over gRPC. Without a command: serve."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="run the server", description=_SERVE_DESCRIPTION))
    _add_ask(commands.add_parser("ask", help="ask a running server"))
    _add_tasks(commands.add_parser("tasks", help="list a running server's tasks"))
    add_adapters(commands.add_parser("adapters", help="of a running server"), _DEFAULT_ADDRESS, _adapters)
    _add_demo(commands.add_parser("demo", help="start a server and ask it every built-in task at once"))
    new_key = commands.add_parser("new-key", help="make an API key, and its entry for the tenants file")
    new_key.set_defaults(run=_new_key)
    return parser


_SERVE_DESCRIPTION = """Every setting can be given as a flag, as an environment variable (MTLORA_ and the name in
capitals, such as MTLORA_MAX_NUM_SEQS), or in a YAML file (--config). A flag wins over the environment, that over the
file, that over the default."""


def _add_serve(parser: argparse.ArgumentParser) -> None:
    from server.settings import Settings

    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        default = "" if field.default is None else f" (default: {field.default})"
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        help_text = f"{field.description}{default}".replace("%", "%%")
        if _is_bool(field.annotation):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text, **options)
        else:
            parser.add_argument(flag, metavar="VALUE", help=help_text, **options)
    parser.set_defaults(run=_serve)


def _is_bool(annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return bool in typing.get_args(annotation)
    return annotation is bool


def _serve(options: argparse.Namespace) -> int:
    from server.settings import Settings, SettingsError, load_settings

    flags = {name: getattr(options, name) for name in Settings.model_fields if hasattr(options, name)}
    try:
        settings = load_settings(flags, options.config)
    except SettingsError as error:
        return _fail(str(error), 2)
    from server.app import serve
    from server.telemetry.logs import configure_logging, finish_logging

    configure_logging(settings.log_level)
    try:
        status = serve(settings, lambda line: print(line, flush=True))
    finally:
        written = finish_logging()
    if not written:
        os._exit(status)
    return status


def _add_access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=_DEFAULT_ADDRESS, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds the API key; default: {_KEY_VARIABLE}'s value",
    )
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM authorities of the server; without: no TLS")
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM certificate to show the server")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its PEM key")


def _access(options: argparse.Namespace) -> Any:
    from mtlora.client import Access

    # Not a flag: other users of the machine can read those.
    if options.api_key_file:
        api_key = options.api_key_file.read_text().strip()
    else:
        api_key = os.environ.get(_KEY_VARIABLE)
    return Access(api_key, options.tls_ca, options.tls_certificate, options.tls_key)


def _new_key(options: argparse.Namespace) -> int:
    from server.tenants.keys import new_key

    key, key_id, hashed = new_key()
    print(f"the key, shown this once: {key}", file=sys.stderr)
    print(f"- id: {key_id}\n  hash: {hashed}")
    return 0


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task_id", help="which task answers; `tasks` lists them")
    parser.add_argument("input", nargs="?", help="fills the only field of the task's template; - reads stdin")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE", help="fills one named field")
    parser.add_argument("--chat", action="store_true", help="send the input as a user's chat message")
    _add_access(parser)
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    parser.add_argument("--without-adapter", action="store_true", help="let the backbone answer alone")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop string; may be given several times")
    parser.add_argument("--verbose", action="store_true", help="print adapter, tokens and timings on stderr")
    parser.set_defaults(run=_ask)


def _ask(options: argparse.Namespace) -> int:
    from mtlora.client import Client, ServerError

    try:
        given = _ask_input(options)
    except ValueError as error:
        return _fail(str(error), 2)
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    parameters = {name: value for name in names if (value := getattr(options, name)) is not None}
    parameters |= {"timeout": options.timeout, "without_adapter": options.without_adapter}
    try:
        with Client(options.address, _access(options)) as client:
            if options.stream:
                for piece in client.stream(options.task_id, given, **parameters):
                    print(piece.text, end="", flush=True)
                print()
                summary = piece.summary
            else:
                answer = client.generate(options.task_id, given, **parameters)
                print(answer.text)
                summary = answer.summary
    except ValueError as error:
        return _fail(f"not a valid parameter: {error}", 2)
    except OSError as error:
        return _fail(str(error), 2)
    except ServerError as error:
        return _fail_request(error)
    if options.verbose:
        print(summary, end="", file=sys.stderr)
    return 0


def _ask_input(options: argparse.Namespace) -> Any:
    if options.field:
        if options.input is not None:
            raise ValueError("give either an input or --field, not both")
        pairs = [pair.partition("=") for pair in options.field]
        if wrong := [name for name, separator, _ in pairs if not separator]:
            raise ValueError(f"--field {wrong[0]}: expected NAME=VALUE")
        return {name: value for name, _, value in pairs}
    if options.input is None:
        raise ValueError("give an input, or --field NAME=VALUE")
    text = sys.stdin.read() if options.input == "-" else options.input
    return [{"role": "user", "content": text}] if options.chat else text


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    _add_access(parser)
    parser.set_defaults(run=_tasks)


def _tasks(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from mtlora.client import Client, ServerError

    try:
        with Client(options.address, _access(options)) as client:
            tasks = client.tasks()
    except OSError as error:
        return _fail(str(error), 2)
    except ServerError as error:
        return _fail_request(error)
    table = Table("task", "fields", "adapter", "description")
    for task in tasks:
        table.add_row(task.id, ", ".join(task.fields), f"{task.adapter_name}/{task.adapter_version}", task.description)
    Console().print(table)
    return 0


def _adapters(options: argparse.Namespace) -> int:
    from mtlora.client import Client, ServerError

    try:
        with Client(options.address) as client:
            run_action(client, options)
    except ValueError as error:
        return _fail(str(error), 2)
    except ServerError as error:
        return _fail_request(error)
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="default", help="default: %(default)s")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--per-task", type=int, default=10, help="questions a task; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="which questions; default: %(default)s")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from server.cli.demo import run_demo
    from server.cli.process import ServerFailedError

    try:
        return run_demo(options.backbone, options.adapters, per_task=options.per_task, seed=options.seed)
    except ServerFailedError as error:
        return _fail(str(error), 1)


def _fail_request(error: Any) -> int:
    lines = [f"{error.code.name}: {error.message}"]
    if len(error.violations) > 1:
        lines = [f"{error.code.name}:", *(f"  {field}: {description}" for field, description in error.violations)]
    return _fail("\n".join(lines), 1)


def _fail(message: str, status: int) -> int:
    print(f"mtlora-server: {message}", file=sys.stderr)
    return status
