"""Send a command line to a cluster as a Ray job."""
