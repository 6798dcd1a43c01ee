"""The `fused-distill` command."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, env
from .child_processes import end_with_server

# Processes that an engine spawns import this module again before they do anything else.
end_with_server()

_INTERRUPTED = 130  # exit status, as shells report SIGINT


class _Parser(argparse.ArgumentParser):
    """Argument parser whose help lists the keys of the trainer's config if `overrides` is an argument."""

    def format_help(self) -> str:
        text = super().format_help()
        if not any(action.dest == "overrides" for action in self._actions):
            return text
        from .trainer.settings_help import help_lines

        return "\n  ".join([f"{text}\nkeys [default]:", *help_lines()]) + "\n"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _at_least(lowest: int, highest: float = math.inf) -> Callable[[str], int]:
    """Return a parser of integers between lowest and highest."""

    def parse(text: str) -> int:
        value = int(text) if text.removeprefix("-").isdecimal() else lowest - 1
        if not lowest <= value <= highest:
            limit = f"at least {lowest}" if highest == math.inf else f"between {lowest} and {highest}"
            raise argparse.ArgumentTypeError(f"must be an integer {limit}, got {text!r}")
        return value

    return parse


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value  # pyright: ignore[reportUnknownVariableType]


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = _Parser(prog="fused-distill", description="Distillation of language models.")
    parser.add_argument("--version", action="version", version=f"fused-distill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        description = str(run.__doc__)
        command = commands.add_parser(name, help=description.splitlines()[0], description=description)
        command.set_defaults(run=run)
        return command

    serve = add_command("serve-teacher", serve_teacher)
    serve.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    serve.add_argument("model", help="local path or name on the Hugging Face Hub")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind")
    serve.add_argument("--port", type=_at_least(0, 65535), default=8000, help="port to bind; 0: any free one")
    serve.add_argument("--engine", default="transformers", choices=("transformers", "vllm"), help="backend")
    serve.add_argument(
        "--engine-options", type=_json_object, default={}, metavar="JSON", help="arguments of vllm.LLM"
    )
    serve.add_argument("--device", default="auto", help="e.g. cpu or cuda:1; auto: a GPU if available")
    serve.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    serve.add_argument("--max-length", type=_at_least(1), help="maximum sequence length; None: the model's")
    serve.add_argument("--no-hidden-states", action="store_true", help="no hidden states and LM head")
    count = _at_least(1)
    serve.add_argument("--answer-numbers", type=count, default=1 << 26, help="maximum values per response")
    serve.add_argument("--batch-tokens", type=count, default=16384, help="maximum tokens per forward pass")
    serve.add_argument("--max-waiting", type=count, default=256, help="queue length; others get status 429")
    serve.add_argument("--request-seconds", type=_seconds, default=300.0, help="time limit of a request")
    serve.add_argument("--access-log", action="store_true", help="log every request")
    serve.add_argument(
        "--allow-no-token", action="store_true", help="serve on any address without FUSED_DISTILL_TOKEN"
    )

    distil = add_command("train", train)
    distil.add_argument("--resume", action="store_true", help="resume from the last checkpoint")

    checker = add_command("check", check)

    cache = add_command("cache-teacher", cache_teacher)
    cache.add_argument("--output", type=_path, required=True, help="folder of the store")
    cache.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="default: float32")

    for command in (distil, checker, cache):
        command.add_argument("config", help="YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="settings, e.g. steps=3 lora.r=8"
        )

    add_command("env", print_env)
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if any(argument.startswith("-") for argument in rest) or (rest and not hasattr(options, "overrides")):
        hint = "; settings have no dashes, e.g. steps=3" if hasattr(options, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if hasattr(options, "overrides"):
        options.overrides += rest  # argparse does not assign overrides that follow an option
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the command line names."""
    options = parse_arguments(arguments)
    try:
        with _ended_by_signals(options.command) if hasattr(options, "overrides") else nullcontext():
            options.run(options)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"fused-distill {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # a second Ctrl-C during a step
        print(f"fused-distill {options.command}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(_INTERRUPTED)


@contextmanager
def _ended_by_signals(command: str) -> Generator[None]:
    """End the process at once, with one line, on Ctrl-C and SIGTERM, until a run handles them itself.

    A model that loads holds up Python's own handling of Ctrl-C, or catches its exception.
    """

    def end(number: int, _: object) -> None:
        cause = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        os.write(2, f"\nfused-distill {command}: stopped by {cause}\n".encode())
        os._exit(128 + number)

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def serve_teacher(options: argparse.Namespace) -> None:
    """Serve a teacher's log-probabilities and hidden states over HTTP.

    If the environment variable FUSED_DISTILL_TOKEN is set, clients must send it as a bearer token. Without it
    the server answers on loopback addresses only.
    """
    # A model that loads does not hold up Ctrl-C.
    handler = signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    try:
        from .serving.server.start import serve

        serve(options)
    finally:
        signal.signal(signal.SIGINT, handler)


def train(options: argparse.Namespace) -> None:
    """Train a student from a YAML config and print the folder it is saved in."""
    from accelerate import PartialState

    from .trainer.config import load_config
    from .trainer.loop import train

    student = train(load_config(options.config, options.overrides), options.resume)
    if PartialState().is_local_main_process:
        print(student)


def check(options: argparse.Namespace) -> None:
    """Check a training run before it starts: models, heads, servers, chat formats, time and memory.

    One row per check: a tick, a warning with advice, or a cross. Crosses give exit status 2.
    """
    from .trainer.check import check
    from .trainer.config import load_config

    if not check(load_config(options.config, options.overrides)):
        sys.exit(2)


def cache_teacher(options: argparse.Namespace) -> None:
    """Store teacher.k log-probabilities per token of the data's completions.

    An interrupted run resumes when the command is repeated.
    """
    from .trainer.cache_teacher import store_teacher
    from .trainer.config import load_config

    unused = {"output": options.output, "steps": 1}  # by a store
    config = load_config(options.config, options.overrides, unused)
    store_teacher(config, options.output, options.dtype)


def print_env(options: argparse.Namespace) -> None:
    """Print versions, devices, and the backend chosen for each device, for a bug report."""
    print(env.report())


if __name__ == "__main__":
    main()
