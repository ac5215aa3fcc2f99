"""Serving under load: vLLM's client at rising rates, and a simulation of the same."""
