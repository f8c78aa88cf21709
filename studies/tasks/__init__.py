"""Benchmarks: scoring rules, readers of published formats, and a wrapper for lmms-eval."""
