"""Trained runs behind an HTTP address."""
