"""Ingest: convert a source of images to a dataset of verified shards."""
