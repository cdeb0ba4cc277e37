"""What steps cost on hardware that need not be there, and benchmarks of what is."""
