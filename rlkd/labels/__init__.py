"""Pseudo-labels on disk: label runs, shards, manifest, maintenance, card."""
