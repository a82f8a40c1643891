"""Decisions: pure functions of a view, with a reason on every line. Nothing here does I/O."""
