"""From encoded pictures (JPEG, PNG, ...) to pixels of one size."""
