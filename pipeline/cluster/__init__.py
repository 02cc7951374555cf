"""Ray: sessions, attempts, workers, jobs."""
