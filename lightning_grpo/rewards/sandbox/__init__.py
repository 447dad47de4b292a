"""Processes that evaluate what a model wrote, separated from the run."""
