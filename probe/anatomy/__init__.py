"""Anatomy: where an architecture keeps its parts. Resolve, verify, override."""

from probe.anatomy.resolve import Anatomy, resolve
from probe.anatomy.rows import ROWS, Row, row_of
from probe.anatomy.verify import Check, verify

__all__ = ["ROWS", "Anatomy", "Check", "Row", "resolve", "row_of", "verify"]
