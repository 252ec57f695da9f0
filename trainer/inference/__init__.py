"""What can be done with a trained net: evaluate, predict, export."""
