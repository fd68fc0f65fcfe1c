"""What is masked and what is not: check digits against their definitions, ordinary numbers against a fuzzer."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgeslm.errors import DataError
from edgeslm.specs import ScrubSpec
from edgeslm.stages.data import Document
from edgeslm.stages.labelled import Labelled
from edgeslm.stages.scrub import CARD_LENGTHS, IBAN_LENGTHS, MASKS, Scrubber, luhn, mod_97, read_names

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = ScrubSpec()


def scrub(text: str, *names: str) -> str:
    return Scrubber(EVERYTHING, names).scrub(text)


# --- check digits ---


def luhn_by_table(digits: str) -> bool:
    """ISO/IEC 7812-1's own table: twice a digit, digits of the product added."""
    twice = {0: 0, 1: 2, 2: 4, 3: 6, 4: 8, 5: 1, 6: 3, 7: 5, 8: 7, 9: 9}
    total = 0
    for place, digit in enumerate(digits[::-1]):
        total += twice[int(digit)] if place % 2 else int(digit)
    return total % 10 == 0


def iban_check(country: str, account: str) -> str:
    """The two check digits of ISO 13616: 98 minus the remainder with zeros in their place."""
    number = "".join(str(int(char, 36)) for char in account + country + "00")
    return f"{98 - int(number) % 97:02d}"


@given(st.from_regex(r"[0-9]{2,25}", fullmatch=True))
def test_luhn_is_the_table_s(digits: str) -> None:
    assert luhn(digits) == luhn_by_table(digits)


def cards() -> st.SearchStrategy[str]:
    """Numbers of every first digit and length with the right check digit."""

    def whole(first: str, length: int) -> st.SearchStrategy[str]:
        body = st.text("0123456789", min_size=length - 2, max_size=length - 2)
        return body.map(
            lambda text: next(
                number for last in "0123456789" if luhn_by_table(number := f"{first}{text}{last}")
            )
        )

    return st.one_of(*(whole(first, length) for first, some in CARD_LENGTHS.items() for length in some))


@given(cards(), st.sampled_from(["", " ", "-"]), st.data())
def test_cards_with_the_right_check_digit_only(number: str, by: str, data: st.DataObject) -> None:
    written = by.join(number[at : at + 4] for at in range(0, len(number), 4))
    assert scrub(f"card {written}, thanks") == "card [CARD], thanks"
    place = data.draw(st.integers(1, len(number) - 1))
    wrong = (
        number[:place] + str((int(number[place]) + data.draw(st.integers(1, 9))) % 10) + number[place + 1 :]
    )
    assert not luhn(wrong)
    assume(by == "")
    cut = max(CARD_LENGTHS[number[0]])
    if len(number) == cut or cut == 16:
        assert "[CARD]" not in scrub(f"card {wrong}, thanks")


@pytest.mark.parametrize(
    "number",
    ["4111 1111 1111 1111", "5555555555554444", "3782 822463 10005", "378282246310005", "6011-1111-1111-1117",
     "3056 930902 5904", "2223003122003222", "4222222222222"],
)  # fmt: skip
def test_the_card_schemes_test_numbers(number: str) -> None:
    assert scrub(f"Card no. {number} 12/27") == "Card no. [CARD] 12/27"


def ibans() -> st.SearchStrategy[str]:
    def whole(country: str) -> st.SearchStrategy[str]:
        size = IBAN_LENGTHS[country] - 4
        account = st.text("0123456789", min_size=size, max_size=size)
        return account.map(lambda text: f"{country}{iban_check(country, text)}{text}")

    return st.sampled_from(sorted(IBAN_LENGTHS)).flatmap(whole)


@given(ibans(), st.booleans(), st.data())
def test_ibans_with_the_right_check_digits_only(iban: str, spaced: bool, data: st.DataObject) -> None:
    assert mod_97(iban)
    written = " ".join(iban[at : at + 4] for at in range(0, len(iban), 4)) if spaced else iban
    assert scrub(f"to {written} BIC COBADEFF") == "to [IBAN] BIC COBADEFF"
    assert scrub(f"({written.lower()})") == "([IBAN])"
    place = data.draw(st.integers(2, len(iban) - 1))
    wrong = iban[:place] + str((int(iban[place]) + data.draw(st.integers(1, 9))) % 10) + iban[place + 1 :]
    assert not mod_97(wrong)
    assert "[IBAN]" not in scrub(f"to {wrong} BIC")


@pytest.mark.parametrize(
    "iban",
    ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR14 2004 1010 0505 0001 3M02 606",
     "NO93 8601 1117 947", "MT84MALT011000012345MTLCAST001S", "CH93-0076-2011-6238-5295-7"],
)  # fmt: skip
def test_the_registry_s_examples(iban: str) -> None:
    assert scrub(f"IBAN: {iban}.") == "IBAN: [IBAN]."


# --- finds ---


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Mail bob.x+y@mail.example.co.uk.", "Mail [EMAIL]."),
        ("<mailto:a_b@x-y.org>", "<mailto:[EMAIL]>"),
        ("grüße@müller.example, x@y.xn--p1ai!", "[EMAIL], [EMAIL]!"),
        (r'"bob\@example.com";', '"[EMAIL]";'),
        ("(o'neill@example.com)", "([EMAIL])"),
        (f"{'long' * 40}@example.com", "[EMAIL]"),
        ("10.0.0.1-10.0.0.9 src=192.168.1.1/24", "[IP]-[IP] src=[IP]/24"),
        ("http://8.8.8.8:80/ and [127.0.0.1].", "http://[IP]:80/ and [[IP]]."),
        ("2001:db8::1, fe80::1%eth0, [2001:db8:0:0:0:0:0:1]:443", "[IP], [IP]%eth0, [[IP]]:443"),
        ("Ring +49 (0)30 1234567 or +1 (555) 123-4567!", "Ring [PHONE] or [PHONE]!"),
        ("+442079460958", "[PHONE]"),
        ("030/1234567 0171-123 4567 020 7946 0958", "[PHONE] [PHONE] [PHONE]"),
        ("(030) 1234567, 01711234567", "[PHONE], [PHONE]"),
        ("01.23.45.67.89 or 01 23 45 67 89", "[PHONE] or [PHONE]"),
        ("555-123-4567, (555) 123-4567, 1-800-555-0199, 555.123.4567", "[PHONE], [PHONE], [PHONE], [PHONE]"),
        ("Tel.: 123456. Phone 555 123 4567; fax: 12 34 56 78", "Tel.: [PHONE]. Phone [PHONE]; fax: [PHONE]"),
        ("call us at 5551234", "call us at [PHONE]"),
        ("0049 30 1234567; 01.23.45.67.89 01.23.45.67.89", "[PHONE]; [PHONE] [PHONE]"),
    ],
)
def test_what_is_masked(text: str, masked: str) -> None:
    assert scrub(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "x@localhost, lodash@4.17.21, @name, a @ b.c, @app.route('/x')",
        "version 1.2.3.4, v1.2.3.4, Chrome/86.0.4240.198, package==1.2.3.4, x>=1.2.3.4, section 6.1.2.3, § 1.2.3.4",
        "numpy-1.2.3.4, 1.2.3.4-beta, 1.2.3.4.5, 300.1.1.1, 1.2.3",
        "a[::2], std::vector, x::y, ::1, 12:30:45, 00:1a:2b:3c:4d:5e, 1:2:3",
        "2002-08-22, 22.08.2002, 08/22/2002, 01-02-2003, 2002-08-22T09:15:00+01:00, Sat 24 09:42:10 +1000 2002",
        "1,234,567.89, 3.14159265358979, 1234567890, 0.30000000000000004, 6.02e23, -12345678901, +12345678",
        "ISBN 978-3-16-148410-0 and 0-306-40615-2, ZIP 02139-4307, mode 0755, 0x7fffffff, 09:00-17:00, 0900-1700",
        "00 01 02 03 04 05 06 07 08 09, 007, 1e-05, 100 200 3000, 50.000.000, 1 000 000 000",
        "call on 2002-08-22, call 1000 times, call f(0), phone 2000, telephone 911, cell A1:B2",
        "4111111111111112, 1234567890123456, 0.4111111111111111, 3.1415926535897932",
        "DE88370400440532013000, no12 people came to the meeting at noon, AB12CDEF",
    ],
)
def test_what_is_not(text: str) -> None:
    assert scrub(text) == text


DATES = (
    "%Y-%m-%d %H:%M:%S", "%d.%m.%Y", "%m/%d/%Y %H:%M", "%d-%m-%Y", "%Y%m%d", "%H:%M:%S.%f", "%j/%Y", "%d %m %Y",
    "%a, %d %b %Y %H:%M:%S +0100", "%d.%m.%y, %H.%M", "%Y-%m-%dT%H:%M:%S.%fZ",
)  # fmt: skip


@given(st.datetimes(), st.sampled_from(DATES))
def test_dates_and_times_stay(moment: object, form: str) -> None:
    text = f"on {moment:{form}} at"
    assert scrub(text) == text


@given(st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False)), st.sampled_from(["", ",", "_"]))
def test_ordinary_numbers_stay(number: float, by: str) -> None:
    for text in (repr(number), f"{number:{by}}", f"({number:{by}.3f})", f"x = {number}; y"):
        if not isinstance(number, int) or abs(number) < 10**9 or by == "":
            assert scrub(text) == text


@given(st.lists(st.integers(0, 99), min_size=3, max_size=3), st.sampled_from(["", "rc1", "-dev", "+cpu"]))
def test_versions_stay(parts: list[int], suffix: str) -> None:
    text = f"edgeslm {'.'.join(map(str, parts))}{suffix} is out"
    assert scrub(text) == text


@given(st.text(st.characters(exclude_characters="@:", exclude_categories=["N"])))
def test_text_without_digits_stays(text: str) -> None:
    assert scrub(text) == text


@given(st.text(st.sampled_from("01289 +-.()/:@abDE\n"), max_size=60))
def test_scrubbed_text_has_nothing_left(text: str) -> None:
    once = scrub(text)
    again = Scrubber(EVERYTHING)
    assert again.scrub(once) == once
    assert not again.counts


@pytest.mark.parametrize(
    "text", ["1" * 50_000, "1 " * 50_000, "a" * 50_000, "a@" * 50_000, "a." * 50_000, "DE12 " * 10_000, ":" * 50_000,
             "+1-" * 20_000, "0" * 50_000, "(0" * 20_000, "1.2.3." * 10_000, "tel" * 20_000, "4111 1111 " * 5_000,
             "a:" * 20_000, "é" * 50_000, "a\u0301" * 20_000, "tel. " * 10_000]
)  # fmt: skip
def test_time_grows_with_the_text(text: str) -> None:
    start = time.process_time()
    scrub(text, "a b", "tel tel tel x")
    assert time.process_time() - start < 5


# --- names ---


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Ann, ANN and Annabel; Joann", "[NAME], [NAME] and Annabel; Joann"),
        (
            "anna müller; ANNA  MÜLLER's; Anna\nMu\u0308ller; Anna, Müller",
            "[NAME]; [NAME]'s; [NAME]; [NAME], Müller",
        ),
        ("O'Brien and o\u2019brien", "[NAME] and [NAME]"),
        ("Jean-Luc Picard, jean luc picard, Jean-Luc", "[NAME], [NAME], [NAME]-Luc"),
        ("Herr Strauss, Herr STRAUSS, Herr Strauß", "Herr [NAME], Herr [NAME], Herr [NAME]"),
        ("हिन्दी राम and हिन्दीx", "[NAME] and हिन्दीx"),
        ("ann_smith.doc, ann@example.com", "[NAME]_smith.doc, [EMAIL]"),
    ],
)
def test_names_are_whole_words_and_the_longest_counts(text: str, masked: str) -> None:
    names = ("Ann", "Anna", "Anna Müller", "O'Brien", "Jean", "Jean-Luc Picard", "Strauß", "हिन्दी राम")
    assert scrub(text, *names) == masked


def test_names_out_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffAnn\n\n  Bob Smith \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Çelik", encoding="utf-8")
    assert read_names(["a.txt", "b.txt"], base=tmp_path) == ["Ann", "Bob Smith", "Çelik"]
    (tmp_path / "c.txt").write_text("\n")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    for name, message in (("c", "holds no names"), ("d", "can't be read as UTF-8"), ("e", r"e\.txt")):
        with pytest.raises(DataError, match=message):
            read_names([f"{name}.txt"], base=tmp_path)


# --- the whole ---


def test_kinds_that_are_switched_off_stay() -> None:
    text = "a@b.org +44 20 7946 0958 GB82WEST12345698765432 4111111111111111 10.0.0.1 Ann"
    marks = {"emails": 0, "phones": 1, "ibans": 2, "cards": 3, "addresses": 4}
    for kind in marks:
        scrubber = Scrubber(ScrubSpec(**{other: other == kind for other in marks}), [])
        assert MASKS[kind] in scrubber.scrub(text)
        assert dict(scrubber.counts) == {kind: 1}


def test_counts_are_kept_and_values_are_not() -> None:
    scrubber = Scrubber(EVERYTHING, ["Ann"])
    for _ in range(2):
        scrubber.scrub("Ann: a@b.org, c@d.org, 10.0.0.1")
    assert scrubber.counts == {"names": 2, "emails": 4, "addresses": 2}
    assert "b.org" not in repr(vars(scrubber))


def test_documents_of_every_kind() -> None:
    scrubber = Scrubber(EVERYTHING, ["Ann"])
    assert scrubber.document(Document(text="to a@b.org")) == Document(text="to [EMAIL]")
    cut = scrubber.document(Document(text="Ann wrote: Hi Ann", prompt="Ann wrote: "))
    assert cut == Document(text="[NAME] wrote: Hi [NAME]", prompt="[NAME] wrote: ")
    talk = Document(messages=({"role": "user", "content": "I am Ann"},), given=1)
    assert scrubber.document(talk) == Document(
        messages=({"role": "user", "content": "I am [NAME]"},), given=1
    )
    assert list(scrubber.labelled([Labelled("Ann", "x", "a:1")])) == [Labelled("[NAME]", "x", "a:1")]


def test_many_names_cost_little() -> None:
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(20_000)]
    scrubber = Scrubber(EVERYTHING, names)
    start = time.process_time()
    scrubber.scrub("the quick brown fox " * 20_000 + names[7])
    assert time.process_time() - start < 5
    assert scrubber.counts == {"names": 1}
