"""What analysis and causal both stand on: corpora read through a model, intervals, metrics, and passes that are cut."""
