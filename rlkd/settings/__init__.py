"""Settings from YAML files and flags, and everything that comes from TRL."""
