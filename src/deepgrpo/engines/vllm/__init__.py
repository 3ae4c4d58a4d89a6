"""Sampling by vLLM: `engine.py` first. docs/engines.md says when to choose it."""
