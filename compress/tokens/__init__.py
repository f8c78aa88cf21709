"""Positions removed while a model runs: what is kept, where it stands, and how caches and masks follow."""
