"""Mixture of experts for few tokens."""

from pallas_kernels.moe.op import build_dispatch as build_dispatch
from pallas_kernels.moe.op import down as down
from pallas_kernels.moe.op import gate_up as gate_up
from pallas_kernels.moe.types import Dispatch as Dispatch
from pallas_kernels.moe.types import RouterConfig as RouterConfig
