"""What composes several rooms: quickstart, ablations, and the overhead of generating against
tuning."""
