"""The convolution that the decoder is made of: direct, or tile by tile in the Fourier domain,
chosen for each by a cost model."""
