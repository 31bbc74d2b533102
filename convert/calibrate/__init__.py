"""Quantisation that learns from text: rounding and clipping of each layer are tuned to keep its output."""

from convert.calibrate.source import CalibratedSource as CalibratedSource
from convert.calibrate.text import Calibration as Calibration
