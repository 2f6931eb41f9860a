"""What keeps the service in order over the years: bytes that are kept or removed, backups, and looks for damage."""
