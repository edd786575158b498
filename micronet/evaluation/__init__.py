"""Measuring any predictor: accuracy, latency, cost, reports."""
