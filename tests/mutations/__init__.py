"""Does the suite notice when a mechanism of a promise is taken out? `make test-mutations`."""
