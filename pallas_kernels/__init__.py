"""GPU kernels: arrays in, arrays out, with no knowledge of any model.

Despite the name of the package these are not Pallas kernels. They are written in Triton and launched inside XLA's
program: a kernel is compiled to PTX and embedded as XLA's own custom call for PTX (``_launch.py``). XLA captures that
call in CUDA graphs like a kernel of its own, which keeps a whole decode loop in one graph. Pallas offers no such path:
its lowering to Triton is deprecated.

Each operation is a folder with the same files: ``op.py`` (the public function: shapes, checks, launch), ``types.py``
(its dataclasses, where it has any), ``reference.py`` (the same function in plain JAX), ``triton.py`` (the kernels) and
``config.py`` (block sizes and heuristics). Every operation takes ``implementation=None``, which selects the best
available one, or a name: see :mod:`pallas_kernels._implementation`. Importing the package needs neither a GPU nor
Triton.
"""

from pallas_kernels._device import Target as Target
from pallas_kernels._device import compiling_for as compiling_for
from pallas_kernels._implementation import Implementation as Implementation
from pallas_kernels._launch import CUDA_GRAPH_OPTIONS as CUDA_GRAPH_OPTIONS
from pallas_kernels._launch import MULTI_GPU_CUDA_GRAPH_OPTIONS as MULTI_GPU_CUDA_GRAPH_OPTIONS
from pallas_kernels._launch import LaunchError as LaunchError
from pallas_kernels._launch import is_interpreted as is_interpreted
from pallas_kernels._launch import kernels_available as kernels_available
