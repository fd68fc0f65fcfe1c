"""Answers with grades from 0 to 4, made out of the Python reference: a table with the columns text and grade.

    python grades.py grades.tsv [--examples 4000] [--seed 0]

Each text is a question, a reference answer of four sentences and an answer that holds so many of them as its
grade says.  The other sentences of an answer are about something else, its order is drawn, and some words
are lost on the way, as when someone answers from memory.  The same seed gives the same bytes, by the
same version of Python.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path

import click

from edgeslm.atomic import atomic_write
from edgeslm.stages.data import documents

SOURCE = "pkg://pydoc_data/topics.py#topics"
SENTENCES = 4
"""Sentences of a reference, and the highest grade."""
WORDS = range(6, 21)
LOST_WORDS = 0.1
"""Share of an answer's words that are left out."""


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--examples", type=click.IntRange(min=5), default=4000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, examples: int, seed: int) -> None:
    """Write graded answers to OUT, a .tsv or .jsonl file."""
    if out.suffix not in (".tsv", ".jsonl"):
        raise click.UsageError(f"{out.name}: write a .tsv or a .jsonl file")
    rows = table(passages(), examples, seed)
    buffer = io.StringIO()
    if out.suffix == ".jsonl":
        for text, grade in rows:
            buffer.write(json.dumps({"text": text, "grade": grade}, ensure_ascii=False) + "\n")
    else:
        csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows([("text", "grade"), *rows])
    atomic_write(out, buffer.getvalue())
    click.echo(f"{out}: {len(rows)} answers with grades from 0 to {SENTENCES}")


def passages() -> list[tuple[str, tuple[str, ...]]]:
    """(what it is about, four sentences in a row) of all passages of the Python reference; no sentence twice."""
    found = []
    seen: set[str] = set()
    for document in documents([SOURCE]):
        about, *paragraphs = (document.text or "").split("\n\n")
        about = " ".join(re.sub(r"[*\"`]", "", about.splitlines()[0]).strip(" .").split())
        fresh = [one for paragraph in paragraphs for one in sentences(paragraph) if one not in seen]
        fresh = list(dict.fromkeys(fresh))
        seen.update(fresh)
        starts = range(0, len(fresh) - SENTENCES + 1, SENTENCES)
        found.extend((about, tuple(fresh[at : at + SENTENCES])) for at in starts)
    return found


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph that are prose of 6 to 20 words; examples and grammar are none."""
    if re.search(r"^ {6,}|>>>|::=|^[=*+|-]{3,}", paragraph, re.MULTILINE):
        return []
    plain = re.sub(r"[*\"]|^\s*\[\d+\]", "", " ".join(paragraph.split()))
    return [
        one
        for one in re.split(r"(?<=[.!?]) (?=[A-Z])", plain)
        if len(one.split()) in WORDS and re.fullmatch(r"[A-Z].*[a-z)][.!?]", one)
    ]


def table(found: list[tuple[str, tuple[str, ...]]], examples: int, seed: int) -> list[tuple[str, int]]:
    """(text, grade) of so many answers: every grade equally often, passages in turn."""
    draw = random.Random(seed)
    order = draw.sample(range(len(found)), len(found))
    every = [sentence for _, chosen in found for sentence in chosen]
    rows: dict[str, int] = {}
    while len(rows) < examples:
        at = len(rows)
        about, reference = found[order[at % len(order)]]
        grade = (at + at // len(order)) % (SENTENCES + 1)
        answer = draw.sample(reference, grade)
        while len(answer) < max(SENTENCES, grade):
            other = draw.choice(every)
            if other not in answer and not any(other in one or one in other for one in reference):
                answer.append(other)
        draw.shuffle(answer)
        said = " ".join(remembered(sentence, draw) for sentence in answer)
        rows[
            f"Question: What does the reference say on {about}? Reference: {' '.join(reference)} Answer: {said}"
        ] = grade
    mixed = list(rows.items())
    draw.shuffle(mixed)
    return mixed


def remembered(sentence: str, draw: random.Random) -> str:
    """A sentence without some of its words, at least one of which stays."""
    words = sentence.split()
    return " ".join([word for word in words if draw.random() >= LOST_WORDS] or words[:1])


if __name__ == "__main__":
    main()
