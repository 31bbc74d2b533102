"""Quantization that learns from text: rounding and clipping of each layer are tuned to keep its output."""

from convert.calibrate.calibrated_source import CalibratedSource as CalibratedSource
from convert.calibrate.calibration_data import CalibrationConfig as CalibrationConfig
