"""From files to batches: which samples, in which order, on which rank."""
