"""No retired word is used in names, file names, strings, comments, docstrings and documentation.

The list holds words of this project's former private vocabulary. docs/glossary.md has the terms that replace them.

    python tests/unit/test_language.py              counts per directory
    python tests/unit/test_language.py DIRECTORY    every place in a directory
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCANNED = (
    *("fedfmsl", "export", "trainer_server", "edge_runtime", "devices", "simulation", "benchmarks", "examples"),
    *("tests", "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "mkdocs.yml"),
    ".ci",
)
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".ipynb", ".sh", ""}

# Retired word or phrase → what to write instead.
RETIRED = {
    r"deals?|dealt|dealing": "assign, distribute",
    r"beats?": "heartbeat",
    r"patience": "timeout, deadline, retry delay",
    r"newcomers?": "newer process, new device",
    r"strangers?": "unauthorized client, unknown sample, other text",
    r"elders?": "older process",
    r"lessons?": "handler",
    r"scraps?": "temporary file",
    r"settled?|settles|settling": "assigned, decided, closed",
    r"(take|takes|took|taking) leave": "disconnect, exit",
    r"which is none": "say what it is",
    r"again and again": "repeatedly, with backoff",
    r"twins?": "near-duplicate, copy",
    r"look\W?alikes?": "near-duplicate",
    r"(set|sets|setting) aside": "skipped",
    r"shells?": "I/O loop",
    r"rooms?": "package, space",
    r"mend(s|ed|ing)?": "repair, correct",
    r"whoever|whomever": "name the subject",
    r"befalls?|befell": "happens to",
    r"in the words": "as",
    r"intakes?": "decoding",
    r"vitals?": "health",
    r"voices?": "contribution, vote",
    r"contestants?": "variant",
    r"for want of": "because there is no",
    r"none any more": "has no effect",
    r"as it stands": "current",
    r"(give|gives|gave|giving) way": "shrink, yield",
}
# Standard terms that contain a retired word.
ALLOWED = (
    r"shell[-_ ]completion",
    r"shell=(True|False)",
    r"(POSIX|login|nologin|bash|remote|Windows) shell",
)

_BEFORE, _AFTER = r"(?<![a-zA-Z])", r"(?![a-zA-Z])"
_SPACE = r"[\s#*>\"]+"  # a phrase may continue in the next line of a comment or string
_WORDS = re.compile(
    _BEFORE + "(" + "|".join(f"(?:{word})" for word in RETIRED).replace(" ", _SPACE) + ")" + _AFTER, re.IGNORECASE
)
_ALLOWED = re.compile("|".join(ALLOWED), re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    path: Path  # relative to the repository
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {' '.join(self.text.split())}"


def find_in(text: str, path: Path) -> Iterator[Finding]:
    """Retired words in a text and in the name of its file."""
    for match in _WORDS.finditer(path.stem):
        yield Finding(path, 1, match[0])
    kept = _ALLOWED.sub(lambda allowed: " " * len(allowed[0]), text)
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kept)  # words of CamelCase names
    for match in _WORDS.finditer(split):
        yield Finding(path, split.count("\n", 0, match.start()) + 1, match[0])


def scan() -> Iterator[Finding]:
    for name in SCANNED:
        root = REPOSITORY / name
        for file in [root] if root.is_file() else sorted(root.rglob("*")):
            if file.is_file() and file.suffix in SUFFIXES and file != Path(__file__).resolve():
                if "__pycache__" in file.parts:
                    continue
                yield from find_in(read(file), file.relative_to(REPOSITORY))


def read(file: Path) -> str:
    """The text of a file; of a notebook, its cells without their outputs."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def test_no_retired_words() -> None:
    found = [str(finding) for finding in scan()]
    assert not found, "\n".join(["retired words (tests/unit/test_language.py says what to write instead):", *found])


def test_words_are_found_in_names_phrases_and_camel_case() -> None:
    text = 'BEAT_SECONDS = 1\nclass TwinPhoto: ...\n# tried again\n# and again, not heartbeat\n"shell completion"\n'
    assert [finding.line for finding in find_in(text, Path("x.py"))] == [1, 2, 3]
    assert list(find_in("", Path("tests/test_strangers.py")))


def main(arguments: list[str]) -> None:
    findings = list(scan())
    if arguments:
        for finding in findings:
            if any(finding.path.is_relative_to(each) for each in arguments):
                print(finding)
        return
    counts = Counter(str(finding.path.parent) for finding in findings)
    for directory, count in sorted(counts.items()):
        print(f"{count:5}  {directory}")
    print(f"{len(findings):5}  in all")


if __name__ == "__main__":
    main(sys.argv[1:])
