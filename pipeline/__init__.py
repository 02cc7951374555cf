"""ddpm-pipe: train, sample, score and track DDPMs, on a laptop or a Ray cluster with the same command."""

__version__ = "0.1.0"
