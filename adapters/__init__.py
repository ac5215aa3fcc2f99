"""Trained adapters, one folder each by model; the demo's is the one that is installed."""
