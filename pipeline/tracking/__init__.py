"""Tracking in MLflow, through a spool so that training never waits for it."""
