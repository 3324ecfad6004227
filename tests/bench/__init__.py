"""Measurements that no test asserts: run by `make bench`, not collected by pytest."""
