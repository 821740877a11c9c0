"""Around training, whatever the algorithm: run.json, files, checkpoints, resuming, guards, progress, the card."""
