"""What cannot work on a part of a sequence says so while `length_parallel` splits sequences."""

from selectra.errors import ConfigError

# The splits that hold now, innermost last; changed by one list operation at a time.
splits: list[object] = []


def require_whole(what: str) -> None:
    """Raise inside a `length_parallel` block.

    Raises:
        ConfigError: Each process has a part of the sequence alone, and `what` needs the whole.
    """
    if splits:
        raise ConfigError(
            f"{what} needs the whole sequence, and length_parallel gives each process a part; it splits "
            "selective_scan, causal_conv1d and what acts on each position alone (S6, Bidirectional, MambaLM with "
            "mixer='mamba'). Run this outside the block."
        )
