"""Measure what quantization costs, as ratios of works run in turn in one process."""
