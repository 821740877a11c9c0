"""The promptsource engine: templates found, parsed, checked, and rendered within bounds."""
