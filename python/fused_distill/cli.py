"""The `fused-distill` command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .serving.server.engine import TeacherEngine


class _Parser(argparse.ArgumentParser):
    """A command's; with keys its help lists those of the trainer's settings."""

    def __init__(self, *arguments: Any, keys: bool = False, **options: Any):
        super().__init__(*arguments, **options)
        self.keys = keys

    def format_help(self) -> str:
        text = super().format_help()
        if not self.keys:
            return text
        from .trainer.config import described

        return "\n  ".join([f"{text}\nkeys [default]:", *described()]) + "\n"


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    parser = argparse.ArgumentParser(prog="fused-distill", description="Distillation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    serve = commands.add_parser(
        "serve-teacher",
        help="serve a teacher's log-probabilities over HTTP",
        description=serve_teacher.__doc__,
    )
    serve.set_defaults(run=serve_teacher)
    serve.add_argument("model", help="local path or hub name")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    serve.add_argument(
        "--engine-options",
        type=_object,
        metavar="JSON",
        help="further arguments of vllm.LLM, say '{\"tensor_parallel_size\": 4}'",
    )
    serve.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    serve.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    serve.add_argument("--max-length", type=int, help="longest sequence (default: the model's)")
    serve.add_argument(
        "--no-hidden-states", action="store_true", help="give neither hidden states nor the head"
    )
    serve.add_argument("--answer-numbers", type=int, default=1 << 26, help="most numbers of an answer")
    serve.add_argument("--batch-tokens", type=int, default=16384, help="tokens of one forward pass")
    serve.add_argument("--max-waiting", type=int, default=256, help="requests that may wait; more get 429")
    serve.add_argument("--request-seconds", type=float, default=300.0, help="time limit of a request")
    for name, run, about in (
        ("train", train, "distil a student"),
        ("cache-teacher", cache_teacher, "store a teacher's top k of the data's completions"),
    ):
        command = commands.add_parser(name, help=about, description=run.__doc__, keys=True)
        command.set_defaults(run=run)
        command.add_argument("config", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="say teacher.k=16")
        if run is train:
            command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        else:
            command.add_argument("--output", type=Path, required=True, help="folder of the store")
            command.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    return parser


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    whole = parser()
    options, rest = whole.parse_known_args(arguments)
    if any(argument.startswith("-") for argument in rest) or (rest and not hasattr(options, "overrides")):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(options, "overrides"):
        options.overrides += rest  # argparse misses those behind an option
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line names."""
    options = parsed(arguments)
    try:
        options.run(options)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"fused-distill {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def serve_teacher(options: argparse.Namespace) -> None:
    """Serve a teacher. FUSED_DISTILL_TOKEN in the environment is the bearer token that clients must send."""
    from .serving.server.app import check_token, create_app
    from .serving.server.batching import BatchLimits
    from .serving.server.validation import ServerLimits

    # Checked before a model is loaded.
    limits = ServerLimits(request_seconds=options.request_seconds, numbers=options.answer_numbers)
    batch_limits = BatchLimits(options.max_waiting, options.batch_tokens)
    token = os.environ.get("FUSED_DISTILL_TOKEN")
    check_token(token)
    if token is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        warning = "without FUSED_DISTILL_TOKEN everybody who reaches this address may use the teacher"
        print(f"warning: {warning} and download its head", file=sys.stderr)

    import uvicorn

    # Uvicorn raises the signal that ended it once more.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        create_app(_engine(options), token=token, limits=limits, batch_limits=batch_limits),
        host=options.host,
        port=options.port,
        timeout_graceful_shutdown=int(options.request_seconds) + 10,
    )


def train(options: argparse.Namespace) -> None:
    """Distil a student by the settings of a YAML file, and say where it is."""
    from accelerate import PartialState

    from .trainer.config import load_config
    from .trainer.loop import train

    student = train(load_config(options.config, options.overrides), options.resume)
    PartialState().print(student)


def cache_teacher(options: argparse.Namespace) -> None:
    """Store teacher.k log-probabilities a token of the data's completions; run it again to go on."""
    from .trainer.config import load_config
    from .trainer.stored import store_teacher

    store_teacher(load_config(options.config, options.overrides), options.output, options.dtype)


def _engine(options: argparse.Namespace) -> TeacherEngine:
    if options.engine == "vllm":
        if options.device != "auto":
            raise ValueError(f"--device must be auto with --engine vllm, got {options.device!r}")
        from .serving.server.vllm_engine import VllmEngine

        return VllmEngine.load(options.model, options.dtype, options.max_length, options.engine_options)
    if options.engine_options is not None:
        raise ValueError("--engine-options must not be given with --engine transformers")
    import torch

    from .serving.server.transformers_engine import TransformersEngine

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden_states = not options.no_hidden_states
    return TransformersEngine.load(options.model, device, options.dtype, options.max_length, hidden_states)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return found


if __name__ == "__main__":
    main()
