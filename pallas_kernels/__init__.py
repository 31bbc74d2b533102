"""Kernels for GPUs: arrays in, arrays out, knowing nothing of any model.

Each operation is a folder: ``op.py`` (shapes in words, and the launch), ``triton.py`` (the kernels), ``reference.py``
(what they must compute, in plain JAX) and ``shapes.py`` (block sizes). Operations are Triton kernels, launched by XLA
as part of the program around them; see ``_launch.py``. Importing any of this needs neither a GPU nor Triton.
"""

from pallas_kernels._device import Target as Target
from pallas_kernels._device import compiling_for as compiling_for
from pallas_kernels._launch import CUDA_GRAPH_OPTIONS as CUDA_GRAPH_OPTIONS
from pallas_kernels._launch import MULTI_GPU_CUDA_GRAPH_OPTIONS as MULTI_GPU_CUDA_GRAPH_OPTIONS
from pallas_kernels._launch import LaunchError as LaunchError
from pallas_kernels._launch import is_interpreted as is_interpreted
from pallas_kernels._launch import kernels_available as kernels_available
