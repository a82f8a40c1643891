"""What a node sees of its own health: see `health`."""
