"""Wire formats: messages, footers and members, parsed and assembled without decoding values."""
