"""Ray: training workers, evaluation actors, the data stream, and sweeps."""
