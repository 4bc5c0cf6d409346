"""Ray integration: training workers, evaluation actors, the data stream, and sweeps."""
