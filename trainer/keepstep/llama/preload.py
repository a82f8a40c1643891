"""Everything that a rank may import, for a process that loads it ahead and forks ranks.

A rank started from nothing imports only what it needs at once: checkpoints and weights come in when they are
used first, which costs each rank seconds. Whoever forks ranks imports this module, so that no
rank has to; a test looks at what ranks import all the same.
"""
# ruff: noqa: F401

import torch.nested._internal.nested_tensor  # by the first backward pass
import torch.utils.serialization.config  # by the first save

import keepstep.llama.checkpoint
import keepstep.llama.train
import keepstep.llama.weights
