"""The paper's method, without an engine."""
