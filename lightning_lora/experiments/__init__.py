"""Experiments: plan, confounders, runner, search and results."""
