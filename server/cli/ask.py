"""`mtlora-server ask`: send one input (a text, an image or both) to a running server and print the answer."""

import argparse
import sys
from pathlib import Path

from mtlora.client import Client, Input
from server.cli import CommandError
from server.cli.connection import add_address, connect

# Flags of type float, and of type int.
_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_INTS = ("max_new_tokens", "min_new_tokens", "top_k", "seed", "n", "best_of", "priority")
# Flags that may be repeated.
_TOKENS = ("allowed_tokens", "banned_tokens", "stop_token_ids")
_PARAMETERS = (*_FLOATS, *_INTS, *_TOKENS, "stop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the input, the generation and the output."""
    parser.add_argument("task_id", help="which task answers; `tasks` lists them")
    parser.add_argument("input", nargs="?", help="fills the only field of the task's template; - reads stdin")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=VALUE", help="fills one named field")
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="FILE",
        help="a PNG, JPEG or WebP, for a task of images, several times if need be, or for a task of text and image",
    )
    parser.add_argument("--chat", action="store_true", help="send the input as a user's chat message")
    add_address(parser)
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    parser.add_argument("--without-adapter", action="store_true", help="let the backbone answer alone")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="default: %(default)s")
    for kind, names in ((float, _FLOATS), (int, _INTS)):
        for name in names:
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    for name in _TOKENS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="+", metavar="ID")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop string; may be given several times")
    parser.add_argument("--verbose", action="store_true", help="print adapter, tokens and timings on stderr")


def run(options: argparse.Namespace) -> int:
    """Send the request; returns 0, or 1 if an image has no label."""
    given = _input(options)
    with connect(options) as client:
        if options.image and not given and client.task(options.task_id).HasField("image"):
            return _classify(client, options)
        return _generate(client, options, given)


def _generate(client: Client, options: argparse.Namespace, given: Input) -> int:
    """Print the answer to a text, or to a text about an image."""
    parameters = {name: value for name in _PARAMETERS if (value := getattr(options, name)) is not None}
    parameters |= {"timeout": options.timeout, "without_adapter": options.without_adapter}
    if options.image:
        if len(options.image) > 1:
            raise CommandError(f"give --image once: {options.task_id} is a task of text and image", 2)
        parameters["image"] = options.image[0]
    try:
        if options.stream:
            for piece in client.stream(options.task_id, given, **parameters):
                print(piece.text, end="", flush=True)
            print()
            summary = piece.summary
        else:
            answer = client.generate(options.task_id, given, **parameters)
            # Print several samples on a line each.
            for text in [sample.text for sample in answer.samples] or [answer.text]:
                print(text)
            summary = answer.summary
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}", 2) from None
    except ValueError as error:
        raise CommandError(f"not a valid parameter: {error}", 2) from None
    if options.verbose:
        print(summary, end="", file=sys.stderr)
    return 0


def _classify(client: Client, options: argparse.Namespace) -> int:
    """Print each image's labels, likeliest first, with their probabilities."""
    try:
        found = client.classify(options.task_id, options.image, timeout=options.timeout)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}", 2) from None
    for path, each in zip(options.image, found, strict=True):
        if len(found) > 1:
            print(f"{path}:")
        if each.error is not None:
            print(f"mtlora-server: {path}: {each.error}", file=sys.stderr)
        for label, probability in each.probabilities.items():
            print(f"{label}\t{probability:.3f}")
        if options.verbose and each.summary is not None:
            print(each.summary, end="", file=sys.stderr)
    return int(any(each.error is not None for each in found))


def _input(options: argparse.Namespace) -> Input:
    if options.field:
        if options.input is not None:
            raise CommandError("give either an input or --field, not both", 2)
        pairs = [pair.partition("=") for pair in options.field]
        if wrong := [name for name, separator, _ in pairs if not separator]:
            raise CommandError(f"--field {wrong[0]}: expected NAME=VALUE", 2)
        return {name: value for name, _, value in pairs}
    if options.input is None and options.image:
        return ""
    if options.input is None:
        raise CommandError("give an input, --field NAME=VALUE or --image FILE", 2)
    text = sys.stdin.read() if options.input == "-" else options.input
    return [{"role": "user", "content": text}] if options.chat else text
