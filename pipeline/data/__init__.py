"""Datasets on disk, and the exact order in which training reads them."""
