"""PTX text to statements: comments and line directives go, braces become scopes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from npmoe.testing.ptx.errors import PtxSyntaxError

# Directives that end with their line, not with a semicolon.
LINE_DIRECTIVES = re.compile(r"\.(version|target|address_size|loc|file)\b")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"", re.DOTALL)
LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
HEADER = re.compile(r"(\.(visible|weak|extern|common)\s+)*\.(entry|func)\b")
SPACE = re.compile(r"\s*")


@dataclass(slots=True)
class Statement:
    """A statement with its first line; `label` and `block` tell the other two kinds apart."""

    line: int
    text: str
    label: bool = False
    block: list[Statement] | None = field(default=None)


def strip_comments(text: str) -> str:
    """Blank out comments, keeping every newline where it is."""

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return COMMENT.sub(blank, text)


def split_statements(text: str) -> list[Statement]:
    """Split PTX into a tree of statements, one list for each pair of braces."""
    return _Splitter(strip_comments(text)).module()


class _Splitter:
    """Walks over the text once."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.newlines = [i for i, c in enumerate(text) if c == "\n"]
        self.line, self.counted = 1, 0

    def line_here(self) -> int:
        """Give the line of the current position; positions only grow."""
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def module(self) -> list[Statement]:
        """Read to the end of the text."""
        out = self.block()
        if self.at < len(self.text):
            raise PtxSyntaxError(f"parse: a }} at PTX line {self.line_here()} closes nothing.")
        return out

    def block(self) -> list[Statement]:
        """Read statements up to a closing brace, which is left."""
        out: list[Statement] = []
        while True:
            match = SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at >= len(self.text) or self.text[self.at] == "}":
                return out
            line = self.line_here()
            if self.text[self.at] == "{":
                out.append(Statement(line, "", block=self.braces()))
                continue
            if self.text[self.at] == ";":
                self.at += 1
                continue
            label = LABEL.match(self.text, self.at)
            if label:
                self.at = label.end()
                out.append(Statement(line, label[1], label=True))
                continue
            out.append(self.statement(line))

    def braces(self) -> list[Statement]:
        """Read ``{ ... }``."""
        line = self.line_here()
        self.at += 1
        inner = self.block()
        if self.at >= len(self.text):
            raise PtxSyntaxError(f"parse: the {{ at PTX line {line} is never closed.")
        self.at += 1
        return inner

    def statement(self, line: int) -> Statement:
        """Read one statement up to its semicolon, its line's end, or the body of a function."""
        rest = self.text[self.at : self.at + 80]
        if LINE_DIRECTIVES.match(rest):
            end = self.text.find("\n", self.at)
            return self.take(line, end if end >= 0 else len(self.text), 0)
        if rest.startswith(".section"):
            end = self.text.find("}", self.at)
            return self.take(line, end + 1 if end >= 0 else len(self.text), 0)
        if HEADER.match(rest):
            stops = [i for i in (self.text.find(c, self.at) for c in "{;") if i >= 0]
            if not stops:
                raise PtxSyntaxError(f"parse: the function at PTX line {line} has no body.")
            end = min(stops)
            if self.text[end] == ";":
                return self.take(line, end, 1)
            out = self.take(line, end, 0)
            out.block = self.braces()
            return out
        end = self.text.find(";", self.at)
        if end < 0:
            raise PtxSyntaxError(f"parse: the statement at PTX line {line} has no semicolon.")
        return self.take(line, end, 1)

    def take(self, line: int, end: int, skip: int) -> Statement:
        """Cut the text up to `end` out, as one line, and step over `skip` more characters."""
        body = " ".join(self.text[self.at : end].split())
        self.at = end + skip
        return Statement(line, body)
