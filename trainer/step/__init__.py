"""One step of training or evaluation, and its figures."""
