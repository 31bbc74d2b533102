"""Quantization with learned rounding: tunes rounding and scales of each layer on text to preserve its output."""

from convert.calibrate.calibrated_source import CalibratedSource as CalibratedSource
from convert.calibrate.calibration_data import CalibrationConfig as CalibrationConfig
