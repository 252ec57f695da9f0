"""Where samples come from: arrays, a dataset of the user's, folders of pictures, record files."""
