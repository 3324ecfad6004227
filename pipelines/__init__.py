"""What people run: the `mft` command, studies, profiles, Prefect flows and deployments."""
