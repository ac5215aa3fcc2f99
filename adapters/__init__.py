"""Adapters that come with the package, one folder each by model; README.md says what they are."""
