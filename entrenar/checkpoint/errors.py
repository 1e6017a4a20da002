from __future__ import annotations

import struct


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is: damaged, incomplete, of another shape, or of an unread kind."""


# What parsers raise on damaged bytes, which they take for lengths, types, names and settings.
DAMAGE = (
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    TypeError,
    AttributeError,
    MemoryError,
    OSError,
    struct.error,
)
