"""Checkpoints in Hugging Face format: reading, writing, and names in files that differ from names in models."""
