"""Run folders, their record and checkpoints."""
