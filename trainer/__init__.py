"""What happens inside a rank: data, model, step, metrics, checkpoints and the loop over them."""
