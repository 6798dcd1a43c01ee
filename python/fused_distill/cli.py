"""The `fused-distill` command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import env

if TYPE_CHECKING:
    from .serving.server.engine import TeacherEngine


class _Parser(argparse.ArgumentParser):
    """Argument parser whose help lists the keys of the trainer's config if `overrides` is an argument."""

    def format_help(self) -> str:
        text = super().format_help()
        if not any(action.dest == "overrides" for action in self._actions):
            return text
        from .trainer.config import help_lines

        return "\n  ".join([f"{text}\nkeys [default]:", *help_lines()]) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(prog="fused-distill", description="Distillation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def add_command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        description = str(run.__doc__)
        command = commands.add_parser(name, help=description.splitlines()[0], description=description)
        command.set_defaults(run=run)
        return command

    serve = add_command("serve-teacher", serve_teacher)
    serve.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    serve.add_argument("model", help="local path or name on the Hugging Face Hub")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind")
    serve.add_argument("--port", type=int, default=8000, help="port to bind")
    serve.add_argument("--engine", default="transformers", choices=("transformers", "vllm"), help="backend")
    serve.add_argument(
        "--engine-options", type=json.loads, default={}, metavar="JSON", help="arguments of vllm.LLM"
    )
    serve.add_argument("--device", default="auto", help="e.g. cpu or cuda:1; auto: a GPU if available")
    serve.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    serve.add_argument("--max-length", type=int, help="maximum sequence length; None: the model's")
    serve.add_argument("--no-hidden-states", action="store_true", help="no hidden states and LM head")
    serve.add_argument("--answer-numbers", type=int, default=1 << 26, help="maximum values per response")
    serve.add_argument("--batch-tokens", type=int, default=16384, help="maximum tokens per forward pass")
    serve.add_argument("--max-waiting", type=int, default=256, help="queue length; others get status 429")
    serve.add_argument("--request-seconds", type=float, default=300.0, help="time limit of a request")

    distil = add_command("train", train)
    distil.add_argument("--resume", action="store_true", help="resume from the last checkpoint")

    cache = add_command("cache-teacher", cache_teacher)
    cache.add_argument("--output", type=Path, required=True, help="folder of the store")
    cache.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="default: float32")

    for command in (distil, cache):
        command.add_argument("config", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. teacher.k=16")

    add_command("env", print_env)
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if any(argument.startswith("-") for argument in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(options, "overrides"):
        options.overrides += rest  # argparse does not assign overrides that follow an option
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the command line names."""
    options = parse_arguments(arguments)
    try:
        options.run(options)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"fused-distill {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def serve_teacher(options: argparse.Namespace) -> None:
    """Serve a teacher's log-probabilities and hidden states over HTTP.

    If the environment variable FUSED_DISTILL_TOKEN is set, clients must send it as a bearer token.
    """
    from .serving.server.app import check_token, create_app
    from .serving.server.batching import BatchLimits
    from .serving.server.connections import ConnectionLimits
    from .serving.server.validation import ServerLimits

    # Validate before loading a model.
    limits = ServerLimits(request_seconds=options.request_seconds, numbers=options.answer_numbers)
    batch_limits = BatchLimits(options.max_waiting, options.batch_tokens)
    token = os.environ.get("FUSED_DISTILL_TOKEN")
    check_token(token)
    if token is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        warning = "anyone who can reach this address can query the teacher and download its LM head"
        print(f"warning: FUSED_DISTILL_TOKEN is not set: {warning}", file=sys.stderr)

    import uvicorn

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again after its shutdown
    app = create_app(
        _load_engine(options), token=token, hosts=(options.host,), limits=limits, batch_limits=batch_limits
    )
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        timeout_graceful_shutdown=int(options.request_seconds) + 10,
        **ConnectionLimits().uvicorn_options(),
    )


def train(options: argparse.Namespace) -> None:
    """Train a student from a YAML config and print the folder it is saved in."""
    from accelerate import PartialState

    from .trainer.config import load_config
    from .trainer.loop import train

    student = train(load_config(options.config, options.overrides), options.resume)
    if PartialState().is_local_main_process:
        print(student)


def cache_teacher(options: argparse.Namespace) -> None:
    """Store teacher.k log-probabilities per token of the data's completions.

    An interrupted run resumes when the command is repeated.
    """
    from .trainer.cache_teacher import store_teacher
    from .trainer.config import load_config

    store_teacher(load_config(options.config, options.overrides), options.output, options.dtype)


def print_env(options: argparse.Namespace) -> None:
    """Print versions, devices, and the backend chosen for each device, for a bug report."""
    print(env.report())


def _load_engine(options: argparse.Namespace) -> TeacherEngine:
    if options.engine == "vllm":
        if options.device != "auto":
            raise ValueError(f"--device must be auto with --engine vllm, got {options.device!r}")
        if not isinstance(options.engine_options, dict):
            raise ValueError(f"--engine-options must be a JSON object, got {options.engine_options}")
        from .serving.server.vllm_engine import VllmEngine

        return VllmEngine.load(options.model, options.dtype, options.max_length, options.engine_options)
    if options.engine_options:
        raise ValueError("--engine-options must not be given with --engine transformers")
    import torch

    from .serving.server.transformers_engine import TransformersEngine

    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    device = default_device if options.device == "auto" else options.device
    hidden_states = not options.no_hidden_states
    return TransformersEngine.load(options.model, device, options.dtype, options.max_length, hidden_states)


if __name__ == "__main__":
    main()
