"""Prompt templates in promptsource's format: finding, parsing, checking and rendering them in a sandbox."""
