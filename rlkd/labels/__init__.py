"""Pseudo-labels on disk: runs, shards, manifest, maintenance, data card."""
