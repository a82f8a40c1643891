"""Weights: a checkpoint exported for transformers; several averaged; weights of any format verified."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from keepstep.core.errors import KeepstepError
from keepstep.llama.weights.verifying import verify_weights
from keepstep.llama.weights.writing import DTYPES, average, export


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="keepstep weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a Hugging Face folder from a checkpoint's folder")
    command.add_argument("checkpoint", type=Path, help="a folder like step-00000060-attempt-0002")
    command.add_argument("out", type=Path, help="a folder that does not exist yet")
    command.add_argument("--dtype", choices=list(DTYPES), default="float32")
    command = commands.add_parser("average", help="write a Hugging Face folder with the mean of several")
    command.add_argument("folders", type=Path, nargs="+", help="checkpoints, Hugging Face or Meta folders")
    command.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    command.add_argument("--dtype", choices=list(DTYPES), default="float32")
    command = commands.add_parser("verify", help="read all of a checkpoint, Hugging Face or Meta folder")
    command.add_argument("folder", type=Path)
    command.add_argument("--against", type=Path, help="another folder that should hold the same weights")
    command.add_argument("--tolerance", type=float, default=0.0, help="how far they may differ (0)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "export":
            shape = export(arguments.checkpoint, arguments.out, dtype=arguments.dtype)
            sys.stdout.write(f"{shape.parameters():,} parameters in {arguments.out}\n")
        elif arguments.command == "average":
            shape = average(arguments.folders, arguments.out, dtype=arguments.dtype)
            sys.stdout.write(f"{shape.parameters():,} parameters in {arguments.out}\n")
        else:
            found = verify_weights(arguments.folder, arguments.against, tolerance=arguments.tolerance)
            same = "" if found.difference is None else f", at most {found.difference:.3g} apart"
            sys.stdout.write(f"{found.shape.parameters():,} parameters, all there and finite{same}\n")
    except KeepstepError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
