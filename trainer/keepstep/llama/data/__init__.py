"""Text as batches that depend on (seed, step) alone. No torch."""

from keepstep.llama.data.corpus import Batch, Corpus, Cut, Stream
from keepstep.llama.data.documents import Documents, open_documents

__all__ = ["Batch", "Corpus", "Cut", "Documents", "Stream", "open_documents"]
