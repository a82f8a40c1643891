"""Let a model continue texts, or answer in a chat: from a checkpoint, or weights in Hugging Face's format.

Texts go to stdout: of one prompt as they come, of several as JSON lines as soon as each is done, in the order
in which they end. What was measured goes to stderr.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepstep.core.checkpoints import MANIFEST, folder_name, inventory
from keepstep.core.errors import InputError, KeepstepError
from keepstep.llama.checkpoint import verify
from keepstep.llama.generation.decoder import Decoder
from keepstep.llama.generation.loop import answers, generate
from keepstep.llama.generation.sampling import Sampling
from keepstep.llama.tokenizer import BYTES, Message, Tokenizer, dialog, open_tokenizer
from keepstep.llama.tokenizer.protocol import ByteTokenizer
from keepstep.llama.weights.sources import CheckpointSource, Source, open_source
from keepstep.llama.weights.writing import DTYPES


def main(argv: Sequence[str]) -> int:
    try:
        return run(_parser().parse_args(argv))
    except KeepstepError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run(options: argparse.Namespace) -> int:
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    for name in ("max_tokens", "batch"):
        if getattr(options, name) < 1:
            raise InputError(f"{getattr(options, name)} is too few", where=f"--{name.replace('_', '-')}")
    if bool(options.prompt) == bool(options.file):
        raise InputError(
            "there is no prompt" if not options.file else "prompts come from two places", where="generate",
            next="Give --prompt TEXT (also several times), or --file with JSON lines, - for stdin.",
        )  # fmt: skip
    said = [{"prompt": text} for text in options.prompt] or _lines(options.file)
    folder = newest(options.weights)
    source = open_source(folder)
    tokenizer = open_tokenizer(options.tokenizer or _beside(folder, source))
    _check(tokenizer, source)
    prompts = [_tokens(one, tokenizer, chat=options.chat) for one in said]
    if isinstance(source, CheckpointSource):
        verify(folder)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model = Decoder(source, dtype=DTYPES[dtype], device=device)

    begun, count = time.perf_counter(), 0
    for first in range(0, len(prompts), options.batch):
        stream = generate(
            model, prompts[first : first + options.batch], most=options.max_tokens, sampling=sampling,
            stops=frozenset() if options.ignore_stops else tokenizer.stops, first=first,
        )  # fmt: skip
        for answer in answers(stream, tokenizer):
            count += 1
            if options.prompt and len(prompts) == 1 and not options.json:
                sys.stdout.write(answer.fresh + ("\n" if answer.ended else ""))
            elif answer.ended:
                record = {"text": answer.text, "tokens": len(answer.tokens), "ended": answer.ended}
                sys.stdout.write(json.dumps(said[answer.prompt] | {"number": answer.prompt} | record) + "\n")
            sys.stdout.flush()
    elapsed = time.perf_counter() - begun
    sys.stderr.write(f"{count:,} tokens in {elapsed:.2f} s, {count / elapsed:,.1f} tokens/s\n")
    return 0


def newest(folder: Path) -> Path:
    """A folder of checkpoints stands for the newest complete one in it."""
    if (folder / MANIFEST).is_file():
        return folder
    complete = [found for found in inventory(folder) if found.complete] if folder.is_dir() else []
    return folder / folder_name(complete[-1].at) if complete else folder


def _beside(folder: Path, source: Source) -> Path | str:
    """The tokenizer where none is named: the files beside the weights, bytes for a model of that size."""
    for file in ("tokenizer.model", "original/tokenizer.model", "tokenizer.json"):
        if (folder / file).is_file():
            return folder / file
    if source.shape.vocabulary == ByteTokenizer.vocabulary:
        return BYTES
    raise InputError(
        "there is no tokenizer", where=str(folder),
        why=f"none lies beside the weights, whose vocabulary is {source.shape.vocabulary:,}",
        next="Name the file it was trained with: --tokenizer tokenizer.model.",
    )  # fmt: skip


def _check(tokenizer: Tokenizer, source: Source) -> None:
    if tokenizer.vocabulary > source.shape.vocabulary:
        raise InputError(
            "the tokenizer does not fit the weights", where="--tokenizer",
            why=f"it has {tokenizer.vocabulary:,} entries, the model {source.shape.vocabulary:,}",
            next="Name the one that the model was trained with.",
        )  # fmt: skip
    if isinstance(source, CheckpointSource):
        trained = str(source.manifest.data.get("digest", "")).partition(":")[0]
        if trained and trained != tokenizer.name:
            raise InputError(
                "the model was trained with another tokenizer", where="--tokenizer",
                why=f"{trained} there, {tokenizer.name} here", next="Name the file it was trained with.",
            )  # fmt: skip


def _lines(name: str) -> list[dict[str, Any]]:
    """JSON lines with `prompt` (text) or `messages` (role and content of each)."""
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot be read", where=name, why=str(error)) from error
    found = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            one = json.loads(line)
            if not isinstance(one, dict) or not ({"prompt", "messages"} & one.keys()):
                raise ValueError("it has neither prompt nor messages")
        except ValueError as error:
            raise InputError(f"line {number} is no prompt", where=name, why=str(error)) from error
        found.append(one)
    if not found:
        raise InputError("there is no prompt", where=name, why="the file is empty")
    return found


def _tokens(one: dict[str, Any], tokenizer: Tokenizer, *, chat: bool) -> Tensor:
    try:
        if "messages" in one:
            messages = [Message(message["role"], message["content"]) for message in one["messages"]]
        else:
            messages = [Message("user", one["prompt"])] if chat else []
        if messages:
            return torch.from_numpy(dialog(tokenizer, messages))
        text = tokenizer.encode(one["prompt"].encode())
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "is no prompt", where=json.dumps(one)[:80], why=f"{type(error).__name__}: {error}",
            next='Write {"prompt": TEXT} or {"messages": [{"role": ROLE, "content": TEXT}]}.',
        ) from error  # fmt: skip
    return torch.from_numpy(np.concatenate([np.array([tokenizer.bos], np.int64), text]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keepstep generate", description=__doc__)
    parser.add_argument("weights", type=Path, help="a checkpoint, a folder of them, or a Hugging Face folder")
    parser.add_argument("--prompt", "-p", action="append", default=[], help="a text to go on from")
    parser.add_argument("--file", "-f", help="prompts as JSON lines: prompt, or messages; - for stdin")
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says in a chat")
    parser.add_argument("--tokenizer", help="its file; left out: what lies beside the weights, else bytes")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default): the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest with this sum (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--ignore-stops", action="store_true", help="go on after stop tokens")
    parser.add_argument("--batch", type=int, default=8, help="prompts that are answered together (8)")
    parser.add_argument("--json", action="store_true", help="JSON lines for a single prompt, too")
    parser.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 on GPUs, else float32")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
