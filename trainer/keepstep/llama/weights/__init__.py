"""Weights in and out of Hugging Face's format."""

from keepstep.llama.weights.naming import canonical_name, config_of, hugging_face_name, shape_of
from keepstep.llama.weights.reading import init_from
from keepstep.llama.weights.writing import export

__all__ = [
    "canonical_name",
    "config_of",
    "export",
    "hugging_face_name",
    "init_from",
    "shape_of",
]
