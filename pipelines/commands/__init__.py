"""Commands that need no flow: mft doctor and mft mask."""
