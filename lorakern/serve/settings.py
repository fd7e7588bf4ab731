"""What an operator may set of the server itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and the key.

    Args:
        api_key: what uploads and deletions need; None for none, and the server answers on this machine only.
        max_weights: bytes of a weights file.
        max_requests: completions that run or wait at once.
        max_uploads: uploads at once, each of which may take `max_weights` of the disk.
        read_seconds: how long an upload may send nothing, and how long one more waits for its turn.
    """

    api_key: str | None = None
    max_weights: int = 256 << 20
    max_requests: int = 256
    max_uploads: int = 4
    read_seconds: float = 30.0
