"""Everything that a rank may import, for a process that loads it ahead and forks ranks.

A rank started from nothing imports only what it needs at once: checkpoints and weights come in when they are
used first, which takes each rank a while. Whoever forks ranks imports this module, so that no rank has to; a
test looks at what ranks import all the same. The table of the default text is kept, too: each rank would read
eleven megabytes for it.
"""
# ruff: noqa: F401

import torch.nested._internal.nested_tensor  # by the first backward pass
import torch.utils.serialization.config  # by the first save

import keepstep.llama.checkpoint
import keepstep.llama.train
import keepstep.llama.weights
from keepstep.llama.data.documents import open_documents

open_documents("stdlib")
