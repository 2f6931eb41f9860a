"""Examples, each a folder with a README and a script; modules that several of them use are here."""
