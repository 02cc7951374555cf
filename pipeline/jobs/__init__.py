"""The same command line, sent to a cluster."""
