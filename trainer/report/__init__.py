"""What rank 0 says and draws: in the terminal, in TensorBoard, in ``result.json``."""
