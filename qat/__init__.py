"""HiF8 W8A8 quantization-aware training: the format, the scaling, the runs and their comparison."""

import os

# PyTorch and Numba each bring a pool of OpenMP threads. Left to spin between parallel regions, the idle pool takes
# the cores from the busy one: on two cores a step becomes up to ten times as long. Must be set before either loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
