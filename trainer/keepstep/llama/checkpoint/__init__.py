"""Checkpoints: sharded, written beside training, whole or not there at all, loadable in every layout."""

from keepstep.core.manifest import CorruptCheckpoint, Manifest
from keepstep.llama.checkpoint.restore import load, verify
from keepstep.llama.checkpoint.saver import Identity, Saver

__all__ = ["CorruptCheckpoint", "Identity", "Manifest", "Saver", "load", "verify"]
