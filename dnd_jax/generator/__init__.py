"""The hyper-convolutional generator: decoder, pairs, train step, training, its folder, and
generation."""
