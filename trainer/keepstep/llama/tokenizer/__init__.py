"""From text to tokens and back."""

from keepstep.llama.tokenizer.chat import Message, dialog
from keepstep.llama.tokenizer.protocol import BYTES, ByteTokenizer, Tokenizer, Tokens
from keepstep.llama.tokenizer.vocabulary import open_tokenizer

__all__ = ["BYTES", "ByteTokenizer", "Message", "Tokenizer", "Tokens", "dialog", "open_tokenizer"]
