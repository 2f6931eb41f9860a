"""Examples, each a folder with a README and a command of its own; what they share stands here."""
