"""Measure what quantization costs, as ratios of works run in turn in one process."""

from qat.tools.bench.table import measure

__all__ = ["measure"]
