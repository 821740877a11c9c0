"""Jobs: from settings to loaded models and data, shared by recipes and commands, and what is done with them."""
