"""Mixture of experts."""

from pallas_kernels.moe.op import Plan as Plan
from pallas_kernels.moe.op import Routed as Routed
from pallas_kernels.moe.op import down as down
from pallas_kernels.moe.op import gate_up as gate_up
from pallas_kernels.moe.op import sort_pairs as sort_pairs
