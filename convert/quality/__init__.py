"""Measures how close one model is to another: errors of weights, divergence of predictions, scores on chat tasks."""
