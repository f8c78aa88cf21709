"""Pure functions on recorded tensors: numbers in, numbers out."""
