"""HTTP bodies as the OpenAPI document describes them, and how they are made from the domain."""
