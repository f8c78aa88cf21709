"""Rows of a decoder layer that are not run: visual tokens, or all of them."""
