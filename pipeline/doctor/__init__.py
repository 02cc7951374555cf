"""Whether a cluster is ready for what a profile asks."""
