"""A Subject in, a smaller Subject out; what it costs; how it leaves the house."""
