"""What is kept on disk or in an object store: runs, checkpoints, chunks."""
