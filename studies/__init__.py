"""Questions asked of a model: data, tasks, runs, the command line."""
