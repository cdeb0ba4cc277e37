"""What all trainings share: the loop, checkpoints, batches made ahead, metrics, profiles and
optimizers."""
