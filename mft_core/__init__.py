"""The science of Mask Fine-Tuning: masks, training, merging, evaluation, statistics, artifacts.

Knows neither Prefect nor MLflow and is pleasant in a notebook on its own. Importing this package is cheap:
torch and transformers are imported by the modules that compute, never here.
"""
