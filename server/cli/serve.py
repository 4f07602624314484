"""`mtlora-server serve`: run the server in this process."""

import argparse
import os
from pathlib import Path

from pydantic_settings import CliSettingsSource

from server.cli import CommandError
from server.settings import Settings, SettingsError, load_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting; options contain only flags that are given."""
    parser.description = (
        "Every setting can be given as a flag, as an environment variable (MTLORA_ and the name in capitals, such as "
        "MTLORA_MAX_NUM_SEQS), or in a YAML file (--config). A flag wins over the environment, that over the file, "
        "that over the default."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    CliSettingsSource(Settings, root_parser=parser)


def settings_from(options: argparse.Namespace) -> Settings:
    """The settings from options, environment and file. Raises CommandError."""
    # Add flags with an empty value here, because CliSettingsSource drops them.
    flags = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    try:
        return load_settings(flags, options.config)
    except SettingsError as error:
        raise CommandError(str(error), 2) from None


def run(options: argparse.Namespace) -> int:
    """Serve until a signal, then end the process with the server's exit status."""
    settings = settings_from(options)
    from server.app import serve
    from server.telemetry.logs import configure_logging, finish_logging

    configure_logging(settings.log_level)
    try:
        status = serve(settings, lambda line: print(line, flush=True))
    finally:
        finish_logging()
    # Skip the interpreter's normal exit: vLLM's bindings would write a list of objects left to stderr.
    os._exit(status)
