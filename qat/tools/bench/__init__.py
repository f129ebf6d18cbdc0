"""What quantization costs, as ratios of things run in turn in one process: kernels, steps, memory, evaluation."""

from qat.tools.bench.table import measure

__all__ = ["measure"]
