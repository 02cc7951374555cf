"""Exchange models with other programs; no code of an imported model is run."""
