"""Models to and from other programs; nothing of theirs is run."""
