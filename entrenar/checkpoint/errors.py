from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is: damaged, incomplete, of another shape, or of an unread kind."""
