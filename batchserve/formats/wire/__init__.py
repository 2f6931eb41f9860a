"""Formats down to their bytes: messages, footers and members, found and put together without decoding any values."""
