"""The record in MLflow: what is written, by whom, and how it is read back as tables and figures."""
