"""The body of a training worker, and the job that describes it."""
