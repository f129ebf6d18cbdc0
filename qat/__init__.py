"""HiF8 W8A8 quantization-aware training: the format, the scaling, the runs and their comparison."""

import importlib
import os

# PyTorch and Numba each bring a pool of OpenMP threads. Left to spin between parallel regions, the idle pool takes
# the cores from the busy one: on two cores a step becomes up to ten times as long. Must be set before either loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str):
    """Import `qat.hif8` when it is asked for: it needs PyTorch, which takes seconds to import."""
    if name == "hif8":
        return importlib.import_module("qat.quant.hif8")
    raise AttributeError(f"module 'qat' has no attribute {name!r}")
