"""A shell on a terminal of this process, and what the terminal shows."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyte

COLUMNS = 92


@dataclass(frozen=True, slots=True)
class Run:
    """Letters of one look that stand next to each other."""

    column: int
    text: str
    colour: str
    bold: bool


Row = tuple[Run, ...]


class Terminal:
    """bash, with a prompt that ends in `$ `."""

    def __init__(self, folder: Path, environment: Mapping[str, str], lines: int) -> None:
        self._screen = pyte.Screen(COLUMNS, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, COLUMNS, 0, 0))
        self._shell = subprocess.Popen(
            ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"],
            cwd=folder, env=dict(environment), stdin=slave, stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    @property
    def is_waiting(self) -> bool:
        """Whether the shell waits for a command."""
        self._read()
        return self._screen.display[self._screen.cursor.y].rstrip() == "$"

    def text(self) -> list[str]:
        self._read()
        return [line.rstrip() for line in self._screen.display]

    def screen(self) -> tuple[Row, ...]:
        """Its rows as of now."""
        self._read()
        return tuple(self._row(number) for number in range(self._screen.lines))

    def _row(self, number: int) -> Row:
        line = self._screen.buffer[number]
        letters = [line[column] for column in range(COLUMNS)]
        runs, column = [], 0
        for (colour, bold), found in groupby(letters, lambda letter: (letter.fg, letter.bold)):
            text = "".join(letter.data for letter in found)
            if text.strip():
                runs.append(Run(column + len(text) - len(text.lstrip()), text.strip(), colour, bold))
            column += len(text)
        return tuple(runs)

    def _read(self) -> None:
        while select.select([self._master], [], [], 0)[0]:
            try:
                self._stream.feed(os.read(self._master, 2**16))
            except OSError:  # the shell has ended
                return

    def close(self) -> None:
        """Ends the shell and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGHUP)
        self._shell.wait(10)
        os.close(self._master)
