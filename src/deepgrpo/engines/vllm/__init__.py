"""Sampling by vLLM; start at `engine.py`. docs/engines.md compares the engines."""
