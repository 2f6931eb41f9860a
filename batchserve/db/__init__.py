"""Rows. Tables, connections and migrations of the one database that API and workers share."""
