"""MLflow, behind a spool that training never waits for."""
