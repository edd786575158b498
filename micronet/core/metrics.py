"""How metrics of any task are spelled, in terminals and on pages."""

EQUAL_DB = 300  # the SQNR of equal outputs
_ACRONYMS = {"sqnr": "SQNR", "iou": "IoU", "map": "mAP"}


def metric_label(metric: str) -> str:
    """Spell a metric's name: ``sqnr_db`` -> ``SQNR``, ``mean_iou`` -> ``mean IoU``."""
    words = [_ACRONYMS.get(word, word) for word in metric.replace("/", "_output_").split("_") if word != "db"]
    return " ".join(words)


def drop_text(metric: str, drop: float) -> str:
    """Spell how much worse a metric is: in points, or in its own unit if it is not the accuracy."""
    return f"{100 * drop:+.2f} pt" if metric == "accuracy" else f"{drop:+.4f}"


def value_text(metric: str, value: float) -> str:
    """Spell a metric's value; names with ``_db`` are in decibels."""
    if "_db" in metric:
        return "equal" if value >= EQUAL_DB else f"{value:.1f} dB"
    return f"{value:.4f}"
