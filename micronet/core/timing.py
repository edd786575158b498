"""What a difference between two measured times means."""

NOISE = 1.05  # what two medians of the same network may differ by
LEAST_MS = 0.01  # and in milliseconds: what clocks and calls cost; times are printed to this digit


def is_slower(ours_ms: float, theirs_ms: float) -> bool:
    """Return True if one time exceeds another by more than noise."""
    return ours_ms > NOISE * theirs_ms and ours_ms - theirs_ms >= LEAST_MS
