"""Experiment files and cluster profiles: schemas, defaults, presets."""
