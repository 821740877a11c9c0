"""What surrounds a training run: run.json, checkpoints and resuming, finite checks, alarms, trackers, card."""
