"""One thin Prefect task per stage, and the MLflow record; knows `mft_core`, is called by `pipelines`."""
