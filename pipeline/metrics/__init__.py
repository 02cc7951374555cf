"""Scores of generated images, each with its identity."""
