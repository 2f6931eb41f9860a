"""Checks that a test fails when a mechanism of a promise is removed: `make test-mutations`."""
