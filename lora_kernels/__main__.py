"""The command line: `python -m lora_kernels COMMAND`, each command a module of `cli`, imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from lora_kernels import env

COMMANDS = {
    "info": "devices, versions and backends, and why each backend is or is not usable",
    "explain": "which backend and tile a problem takes, and its predicted time",
    "selftest": "every usable backend against float64, forward and all gradients, on this machine",
    "bench": "time LoRA layers against the frozen layer and other implementations",
    "tune": "time the candidate tiles of a GPU and write its table into the user's cache",
    "report": "tables and plots out of benchmark results",
    "demo": "fine-tune a real encoder with the reference layer and with this one",
}


def parser_for(asked: list[str]) -> argparse.ArgumentParser:
    """The parser of a command line; only the command that it names is imported and gets its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels", description="Fused LoRA linear layers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{name}: {summary}.")
        if name in asked[:1]:
            module = importlib.import_module(f"lora_kernels.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 the command found something wrong, 2 it could not be carried out."""
    asked = sys.argv[1:] if argv is None else argv
    args = parser_for(asked).parse_args(asked)
    try:
        env.log_level()  # a bad one is an error here, and a warning in a library
        env.logger()
        code = args.run(args)
        if sys.stdout is not None:  # as where a shell closed it
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, such as `head`, has ended; the interpreter's last flush must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (
        *(ValueError, TypeError, ArithmeticError, MemoryError),
        *(ModuleNotFoundError, RuntimeError, OSError),
    ) as error:
        # The first line: PyTorch's errors go on with the calls in C++ that led to them.
        text = (str(error).strip() or repr(error)).splitlines()[0]
        print(f"lora_kernels {args.command}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lora_kernels {args.command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
