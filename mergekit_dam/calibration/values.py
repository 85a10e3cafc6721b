"""The values of a .json file, one after the other, with a bounded part of it in memory."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from mergekit_dam.calibration.rows import refuse_long
from mergekit_dam.errors import CalibrationError

BLOCK = 2**20  # characters
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_TAIL = 16  # characters: an error so near to the end may be that of a value that is cut off


class JsonValues:
    """Reads JSON values from a text, a block at a time.

    Args:
        read: Returns the next characters, at most as many as asked for; "" at the end.
        file: Name of the file, for errors.
    """

    def __init__(self, read: Callable[[int], str], *, file: str) -> None:
        self._read = read
        self._file = file
        self._text = ""
        self._at = 0
        self._ended = False
        self._line, self._column = 1, 1  # of the first character of `_text`

    def peek(self) -> str:
        """The next character that is no white space, which stays; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def value(self) -> Any:
        """The next value.

        Raises:
            CalibrationError: If it is no JSON; the message has its line and column.
        """
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut_off(error):
                    raise self._located(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # 5000 digits, 5000 brackets
                raise CalibrationError(f"{self._file} cannot be parsed as JSON: {error}") from error
            else:
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            self._more()

    def elements(self) -> Iterator[Any]:
        """The elements of the next value, which is a list.

        Raises:
            CalibrationError: If the list is no JSON, or if something follows it.
        """
        self._at += 1
        separator = self.peek()
        while separator != "]":
            yield self.value()
            separator = self.peek()
            if separator not in (",", "]"):
                raise self._located("Expecting ',' delimiter", self._at)
            self._at += separator == ","
        self._at += 1
        if self.peek():
            raise self._located("Extra data after the list", self._at)

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        unterminated = error.msg.startswith("Unterminated string")
        return unterminated or error.pos >= len(self._text) - _TAIL

    def _more(self) -> None:
        """Forget what was used, and read as much as is left (at least a block)."""
        rest = self._text[self._at :]
        refuse_long(len(rest), f"a value of {self._file}")
        self._line, self._column = self._place(self._at)
        block = self._read(max(BLOCK, len(rest)))
        self._ended = not block
        self._text, self._at = rest + block, 0

    def _place(self, position: int) -> tuple[int, int]:
        lines = self._text.count("\n", 0, position)
        if not lines:
            return self._line, self._column + position
        return self._line + lines, position - self._text.rfind("\n", 0, position)

    def _located(self, reason: str, position: int) -> CalibrationError:
        line, column = self._place(position)
        place = f"column {column}" + (f" of line {line}" if line > 1 else "")
        return CalibrationError(f"{self._file} is not JSON: {reason} at {place}")
