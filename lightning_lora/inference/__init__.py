"""Predictions of a trained run for new texts."""
