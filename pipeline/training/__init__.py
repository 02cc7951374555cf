"""The training loop and all that a worker needs for it, without Ray."""
