"""Settings: their ranges and choices, YAML and flags, and everything that comes from TRL."""
