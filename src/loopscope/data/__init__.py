"""Where batches come from: sources, feeds and the order of an epoch."""
