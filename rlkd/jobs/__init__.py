"""Jobs: from settings to loaded models and data, shared by recipes and commands, and the work itself."""
