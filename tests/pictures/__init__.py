"""The pictures of the documentation, made by what they show: `make screenshots`, `make recording`."""
