"""From settings to loaded models and data: the one wiring that recipes and commands share."""
