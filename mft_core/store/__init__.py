"""Immutable results on disk: artifacts and their manifests, the sources they are made of, and where they come from."""
