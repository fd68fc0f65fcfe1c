"""The commands that use a classifier: classify for texts, predict for sensor readings."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeslm.options import ARTIFACT, emit, json_option, split_rates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAILED_EXIT_CODE = 1
"""Every row was bad."""
PIPE_EXIT_CODE = 141
"""Nobody reads any more: what a shell reports of a program that SIGPIPE ended."""
FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".gz")


def decision_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What decides in place of the bundle's own base rates and costs."""
    options = (
        click.option("--prior", multiple=True, metavar="CLASS=RATE", callback=split_rates,
                     help="Base rate where it runs; the others share the rest."),
        click.option("--cost", "costs", multiple=True, metavar="CLASS=COST", callback=split_rates,
                     help="Cost of missing a class."),
        click.option("--threshold", type=click.FloatRange(0, 1, min_open=True),
                     help="Posterior of the watched class from which it is decided for, in place of costs."),
        click.option("-t", "--threads", type=click.IntRange(1, 512), help="Cores to use.  [default: all]"),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command(short_help="Classify texts: a text, a file or a pipe in, JSON lines out.")
@click.argument("bundle", type=ARTIFACT)
@click.argument("source", metavar="[TEXT|FILE|-]", required=False)
@click.option("--format", "kind", type=click.Choice(["lines", "jsonl", "csv", "tsv"]),
              help="Of the input.  [default: as its name or first line says]")  # fmt: skip
@click.option("--column", metavar="NAME", help="Column or key of the text.  [default: as in training]")
@click.option("--jsonl", "each", is_flag=True,
              help="A line of JSON in, a line of JSON out: for a program that asks and waits.")  # fmt: skip
@decision_options
@json_option
def classify(
    *, bundle: Path, source: str | None, kind: str | None, column: str | None, each: bool, as_json: bool,
    **wishes: Any,
) -> None:  # fmt: skip
    """Classify texts with BUNDLE: one text, the rows of a file, or standard input.

    Rows are lines of text, JSON lines, or CSV and TSV with a header.  Each gives one JSON line, in order:
    its line, its id (or else the text), the label decided on, and the classes' probabilities where the
    bundle runs (--prior).  A row that can't be used gives {"line", "error"}.  A summary goes to standard
    error; with --json it alone is printed.  Exit code 1 when there were rows and all of them failed.

    \b
    Example:  edgeslm classify router "Your invoice is overdue"
              edgeslm classify router mails.tsv --cost ham=5 > answers.jsonl
              your-program | edgeslm classify router --jsonl
    """
    from edgeslm import console_predict
    from edgeslm.runtime import answers

    with output(as_json) as sink:
        record = answers.classify(
            bundle, source_of(source), sink, kind=kind, column=column, each=each, **wishes
        )
        finish(record, as_json, console_predict.classify_text)


@click.command(short_help="Score windows of sensor readings: P(E|D), posterior, alarm.")
@click.argument("bundle", type=ARTIFACT)
@click.argument("source", metavar="[SENSORS|-]", required=False)
@click.option("--format", "kind", type=click.Choice(["csv", "tsv", "jsonl"]),
              help="Of the input.  [default: as its name or first line says]")  # fmt: skip
@click.option(
    "--watch", metavar="CLASS", help="The class that alarms.  [default: of two, the rare or dear one]"
)
@click.option("--hold", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Windows in a row at the threshold that make an alarm.")  # fmt: skip
@click.option("--stride", type=click.IntRange(min=1), metavar="ROWS",
              help="Rows from one window to the next.  [default: as in training]")  # fmt: skip
@click.option("--jsonl", "lines", is_flag=True, help="JSON lines in place of a table.")
@decision_options
@json_option
def predict(*, bundle: Path, source: str | None, lines: bool, as_json: bool, **wishes: Any) -> None:
    """Score the windows of a table of readings with BUNDLE, row by row where they come from a pipe.

    Windows are cut as in training: none crosses machines or gaps in time, and one that misses too many
    readings is left out.  Each gives its score, which is P(E|D) under the base rates of training, the
    posterior under those where it runs, and whether that is an alarm.  A row that can't be used gives an
    error in its place.  A summary goes to standard error; with --json it alone is printed.  Exit code 1
    when there were rows and all of them failed.

    \b
    Example:  edgeslm predict bearing week-12.csv --hold 3
              read-sensors | edgeslm predict bearing - --jsonl --prior failure=0.001
    """
    from edgeslm import console_predict
    from edgeslm.runtime import watch
    from edgeslm.runtime.rule import as_lines

    path = source_of(source)
    if isinstance(path, str):
        raise click.UsageError(f"no file {path!r}; give - to read standard input")
    with output(as_json) as sink:
        render = as_lines if lines else console_predict.Table()
        answers = None if sink is None else lambda found: sink(render(found))
        record = watch.predict(bundle, path, answers, **wishes)
        finish(record, as_json, console_predict.predict_text)


def source_of(argument: str | None) -> Path | str | None:
    """A file, a text, or None for standard input.  UsageError where nothing is piped in."""
    if argument is None and sys.stdin.isatty():
        raise click.UsageError("nothing to read: give a text, a file, or - to type lines")
    if argument is None or argument == "-":
        return None
    try:
        if Path(argument).is_file():
            return Path(argument)
    except OSError:  # a text too long for a name
        return argument
    if argument.lower().endswith(FILES) and not any(map(str.isspace, argument)):
        raise click.UsageError(f"no file {argument!r}; to classify a text that looks like one, pipe it in")
    return argument


@contextmanager
def output(as_json: bool) -> Iterator[Callable[[bytes], object] | None]:
    """What takes answers, each list flushed; None where only the record is printed."""

    def write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    try:
        yield None if as_json else write
    except BrokenPipeError:
        # Python flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_EXIT_CODE)


def finish(record: dict[str, Any], as_json: bool, render: Callable[[Any], str]) -> None:
    """Print the summary and end with the exit code that it asks for."""
    if as_json:
        emit(record, as_json, render)
    else:
        click.echo(render(record), err=True)
    if record["failed"] and not record["answered"]:
        sys.exit(FAILED_EXIT_CODE)
