"""The documentation as a site, which `make docs` builds from docs/ and the other Markdown of the project."""
