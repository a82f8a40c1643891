"""python -m keepstep.llama.weights export CHECKPOINT OUT: a checkpoint for transformers' from_pretrained."""

import argparse
import sys
from pathlib import Path

from keepstep.core.errors import KeepstepError
from keepstep.llama.weights.writing import DTYPES, export


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m keepstep.llama.weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a Hugging Face folder from a checkpoint's folder")
    command.add_argument("checkpoint", type=Path, help="a folder like step-00000060-attempt-0002")
    command.add_argument("out", type=Path, help="a folder that does not exist yet")
    command.add_argument("--dtype", choices=list(DTYPES), default="float32")
    arguments = parser.parse_args(argv)
    try:
        shape = export(arguments.checkpoint, arguments.out, dtype=arguments.dtype)
    except KeepstepError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{shape.parameters():,} parameters in {arguments.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
