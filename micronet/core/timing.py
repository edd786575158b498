"""What a difference between two measured times means."""

NOISE = 1.05  # what two medians of the same network may differ by
LEAST_MS = 0.02  # what a call costs whose network computes nothing: 0.012 in ONNX Runtime, 0.018 in OpenVINO


def is_slower(ours_ms: float, theirs_ms: float) -> bool:
    """Return True if one time exceeds another by more than noise, and by more than a call costs."""
    return ours_ms > NOISE * theirs_ms and ours_ms - theirs_ms >= LEAST_MS


def is_no_faster(ours_ms: float, theirs_ms: float) -> bool:
    """Return True if one time exceeds another, of calls that are long enough to be compared."""
    return ours_ms > theirs_ms and theirs_ms * (NOISE - 1) >= LEAST_MS
