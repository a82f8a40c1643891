"""Text from weights: a decoder with a cache of keys and values, sampling, and the loop between them."""

from keepstep.llama.generation.decoder import Decoder
from keepstep.llama.generation.loop import Answer, Token, answers, generate
from keepstep.llama.generation.sampling import Sampling

__all__ = ["Answer", "Decoder", "Sampling", "Token", "answers", "generate"]
