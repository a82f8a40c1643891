"""Text for training: tokenised once into shards that are mapped into memory; verified; described."""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from keepstep.core.errors import InputError, KeepstepError
from keepstep.llama.data import on_ray, shards, tokenise
from keepstep.llama.data.shards import Manifest, Shard


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["worker"]:
        return tokenise.work(Path(argv[1]), int(argv[2]))
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except KeepstepError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return code


def _tokenize(options: argparse.Namespace) -> int:
    begun, read = time.monotonic(), 0

    def tell(shard: Shard, done: int, of: int) -> None:
        nonlocal read
        read += shard.text_bytes
        rate = read / 1e6 / (time.monotonic() - begun)
        sys.stderr.write(f"{done} of {of} shards, {shard.file}: {shard.tokens:,} tokens, {rate:.1f} MB/s\n")

    manifest = tokenise.tokenise(
        options.out, _sources(options.source), tokenizer=options.tokenizer, field=options.field,
        workers=options.workers, unit_bytes=int(options.shard_mb * (1 << 20)), tell=tell,
        make=partial(on_ray.shards_of, address=options.ray) if options.ray else None,
    )  # fmt: skip
    _report(manifest)
    return 0


def _show(options: argparse.Namespace) -> int:
    _report(Manifest.read(options.store))
    return 0


def _verify(options: argparse.Namespace) -> int:
    wrong = list(shards.verify(options.store))
    for error in wrong:
        sys.stderr.write(f"error: {error}\n")
    count = sum(len(of) for of in Manifest.read(options.store).sources.values())
    sys.stdout.write(f"{count - len(wrong)} of {count} shards are as they were written\n")
    return wrong[0].exit_code if wrong else 0


def _report(manifest: Manifest) -> None:
    """A line of JSON for each source on stdout; bad records by name on stderr."""
    for name, of in manifest.sources.items():
        bad: Counter[str] = Counter()
        for shard in of:
            bad.update(shard.bad)
            for one in shard.named:
                sys.stderr.write(f"left out: {one}\n")
        told = {
            "source": name, "shards": len(of), "documents": sum(s.documents for s in of),
            "tokens": sum(s.tokens for s in of), "text_bytes": sum(s.text_bytes for s in of),
            "bad": dict(bad),
        }  # fmt: skip
        sys.stdout.write(json.dumps(told) + "\n")


def _sources(given: Sequence[str]) -> Mapping[str, Path]:
    sources: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or name in sources:
            raise InputError(
                f"{one!r} is no source" if not equals else f"there are two sources {name!r}",
                where="--source",
                next="Write NAME=PATH, each name once.",
            )  # fmt: skip
        sources[name] = Path(path)
    return sources


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keepstep data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("tokenize", help="make or complete a folder of shards")
    make.add_argument("out", type=Path, help="the folder; one that was begun is completed")
    make.add_argument(
        "--source", action="append", required=True, metavar="NAME=PATH",
        help="a file or folder: text, *.jsonl, *.parquet, or a Hugging Face dataset on disk; several times",
    )  # fmt: skip
    make.add_argument("--tokenizer", default="bytes", help="tokenizer.model or tokenizer.json (bytes)")
    make.add_argument("--field", default="text", help="the field or column that has the text (text)")
    make.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(cores)")
    make.add_argument(
        "--ray", metavar="ADDRESS", help="by Ray Data on all nodes of a cluster (auto: this one's)"
    )
    make.add_argument("--shard-mb", type=float, default=64, help="input of a shard (64)")
    make.set_defaults(run=_tokenize)
    for name, run, what in (
        ("show", _show, "what a folder of shards holds"), ("verify", _verify, "read and check all shards"),
    ):  # fmt: skip
        command = commands.add_parser(name, help=what)
        command.add_argument("store", type=Path)
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
