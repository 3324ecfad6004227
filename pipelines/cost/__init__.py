"""What stages cost: measured, read from manifests; and predicted, for what has not run."""
