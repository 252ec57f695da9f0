"""What is drawn to vary training samples, beyond a crop and a flip."""
