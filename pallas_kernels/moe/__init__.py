"""Mixture of experts."""

from pallas_kernels.moe.op import Dispatch as Dispatch
from pallas_kernels.moe.op import RouterConfig as RouterConfig
from pallas_kernels.moe.op import build_dispatch as build_dispatch
from pallas_kernels.moe.op import down as down
from pallas_kernels.moe.op import gate_up as gate_up
