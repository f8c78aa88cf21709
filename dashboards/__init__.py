"""Pages that people look at; they read runs and call the floors below."""
