"""Runs a plan inside a Prefect flow: tasks, what a person sees meanwhile, logs, Ctrl-C."""
