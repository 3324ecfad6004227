"""Servers beside a run: Prefect, MLflow, deployments, and the plugin that finds them."""
