"""What needs a CUDA device; run by `make test-gpu`."""
