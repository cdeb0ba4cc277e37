"""Stage `bench`: our methods beside each other and beside PyTorch, measured in one run; or a TPU
compiler's estimates."""
