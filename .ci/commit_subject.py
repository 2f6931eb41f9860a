#!/usr/bin/env python3
"""Refuses a commit whose message is not as CONTRIBUTING.md asks for; takes the file that holds it."""

import re
import sys
from pathlib import Path

MOST = 72


def fault(message: str) -> str | None:
    """What is wrong with a commit message, if anything is."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject, rest = (lines or [""])[0], lines[1:]
    if not re.match(r"[A-Z][a-z]+ \S", subject):
        return "expected a sentence that begins with a verb, such as 'Refuse truncated Parquet at upload'"
    if len(subject) > MOST:
        return f"expected a subject of at most {MOST} characters, got {len(subject)}"
    if subject.endswith("."):
        return "a subject ends without a full stop"
    if rest and rest[0].strip():
        return "expected an empty line between subject and body"
    if not any(line.strip() for line in rest):
        return "expected a body that says why"
    return None


if __name__ == "__main__":
    if (wrong := fault(Path(sys.argv[1]).read_text())) is not None:
        sys.exit(f"{wrong} (see CONTRIBUTING.md)")
