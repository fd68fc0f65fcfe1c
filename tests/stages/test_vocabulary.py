"""Pruned tokenizers against the whole ones: the same strings on the domain's text, and no text without tokens."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.errors import DataError, ModelError
from edgeslm.stages.chats import renderer
from edgeslm.stages.data import Document
from edgeslm.stages.subwords import Subwords, special_ids
from edgeslm.stages.vocabulary import (
    MULTIPLE,
    check_same_tokens,
    expected_tokens,
    kept_ids,
    kept_tokens,
    not_by_heart,
    rebuilt,
    renumber,
    tokenizer_document,
    used_tokens,
)
from tests.models import CORPUS, HOSTILE_TEXTS, TOKENIZERS, write_hf_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

pytestmark = pytest.mark.workstation

LINES = CORPUS.splitlines()[:8]
DOMAIN = [Document(text="\n".join(LINES[1:3])), Document(text=LINES[6])]
CHAT = Document(messages=({"role": "user", "content": LINES[1]}, {"role": "assistant", "content": LINES[2]}))


def chat(template: str, turns: Sequence[Mapping[str, str]], bos: str, eos: str, asks: bool) -> str:
    from edgeslm.runtime.template import render_chat

    return render_chat(template, turns, bos, eos, add_generation_prompt=asks)


def prune(tokenizer: Any, documents: list[Document], **options: Any) -> tuple[np.ndarray, Any]:
    """(kept ids, the pruned tokenizer), with nothing expected beyond what is used."""
    counts = used_tokens(documents, tokenizer, len(tokenizer), chat).counts
    expected = counts / counts.sum()
    kept = kept_ids(tokenizer, counts, expected, **options)
    return kept, rebuilt(tokenizer, kept)


def strings(tokenizer: Any, text: str, **options: Any) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer.encode(text, **options)))


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp(request.param))


def test_the_domain_falls_into_the_same_tokens(whole: Any) -> None:
    kept, pruned = prune(whole, [*DOMAIN, CHAT])
    assert len(kept) < 0.9 * len(whole)
    assert len(pruned) == len(kept)
    for document in DOMAIN:
        text = document.text or ""
        assert strings(pruned, text) == strings(whole, text)
        ids = whole.encode(text)
        assert [kept[number] for number in pruned.encode(text)] == ids
    rendered = renderer(whole, chat)(CHAT.messages or (), False)
    assert strings(pruned, rendered) == strings(whole, rendered)
    check_same_tokens(whole, pruned, [*DOMAIN, CHAT], chat)


def test_any_other_text_still_has_tokens(whole: Any) -> None:
    _, pruned = prune(whole, DOMAIN)
    for text in HOSTILE_TEXTS:
        ids = pruned.encode(text, add_special_tokens=False)
        assert all(0 <= number < len(pruned) for number in ids)
        assert pruned.decode(ids) == whole.decode(whole.encode(text, add_special_tokens=False)), text


def test_special_tokens_keep_their_meaning(whole: Any, tmp_path: Path) -> None:
    kept, pruned = prune(whole, DOMAIN)
    assert pruned.special_tokens_map == whole.special_tokens_map
    for name in ("bos", "eos", "unk", "pad"):
        before, after = (getattr(one, f"{name}_token_id") for one in (whole, pruned))
        assert (before is None) == (after is None)
        assert before is None or kept[after] == before
    assert pruned.chat_template == whole.chat_template
    assert pruned.padding_side == whole.padding_side
    # Written and read again, as whoever loads the model does it.
    from transformers import AutoTokenizer

    pruned.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*HOSTILE_TEXTS, DOMAIN[0].text or ""):
        assert again.encode(text) == pruned.encode(text)


def test_what_is_expected_stays_in_round_numbers(whole: Any) -> None:
    counts = used_tokens(DOMAIN, whole, len(whole), chat).counts
    likely = np.random.default_rng(0).exponential(size=len(whole))
    likely /= likely.sum()
    used = set(np.flatnonzero(counts).tolist())
    few, more = (kept_ids(whole, counts, likely, unexpected=share) for share in (1.0, 0.02))
    assert used <= set(few.tolist()) <= set(more.tolist())
    assert len(few) % MULTIPLE == 0
    assert len(more) % MULTIPLE == 0 or len(more) > len(whole) // MULTIPLE * MULTIPLE
    assert likely[np.setdiff1d(np.arange(len(whole)), more)].sum() <= 0.02 + 1e-9


def test_a_model_that_knows_its_text_by_heart_keeps_as_many_tokens(tmp_path: Path) -> None:
    """What each document brings that no other has, by brute force, is what the unused tokens get together."""
    tokenizer = TOKENIZERS["smollm"](tmp_path)
    documents = [
        Document(text=line) for line in CORPUS.splitlines()[:8] * 2 + ["only this one: zebra, quartz"]
    ]
    used = used_tokens(documents, tokenizer, len(tokenizer), lambda *_: "")
    texts = [tokenizer.encode(document.text or "") for document in documents]
    others = [{token for j, one in enumerate(texts) if j != i for token in one} for i in range(len(texts))]
    new = sum(token not in others[i] for i, text in enumerate(texts) for token in text)
    assert new > 0
    assert used.novelty == pytest.approx(new / sum(map(len, texts)))

    unused = used.counts == 0
    calibrated = np.where(unused, used.novelty / unused.sum(), (1 - used.novelty) / (~unused).sum())
    sure = np.where(unused, calibrated / 10, calibrated)
    assert np.allclose(not_by_heart(sure, used), calibrated)
    unsure = np.where(unused, calibrated * 2, calibrated)
    assert not_by_heart(unsure, used) is unsure
    assert not_by_heart(sure, used._replace(novelty=None)) is sure
    few = used_tokens(documents[:7], tokenizer, len(tokenizer), lambda *_: "")
    assert few.novelty is None


def test_ids_of_the_configuration_stay(whole: Any) -> None:
    unused = next(
        number for number in range(len(whole) - 1, 0, -1) if number not in prune(whole, DOMAIN)[0].tolist()
    )
    kept, _ = prune(whole, DOMAIN, configs=({"eos_token_id": [whole.eos_token_id, unused], "vocab_size": 7},))
    assert unused in kept


def test_numbers_of_a_configuration() -> None:
    kept = np.array([0, 2, 5, 9])
    before = {
        "bos_token_id": 2, "eos_token_id": [9, 5, 3], "pad_token_id": None, "image_token_id": 7, "hidden_size": 2,
        "suppress_tokens": [5, 4], "bad_words_ids": [[9, 2], [4]], "architectures": ["A"],
        "use_cache": True, "max_new_tokens": 9,
    }  # fmt: skip
    assert renumber(before, kept) == before | {
        "bos_token_id": 1, "eos_token_id": [3, 2], "image_token_id": None, "suppress_tokens": [2],
        "bad_words_ids": [[3, 1]],
    }  # fmt: skip


def test_conversations_need_a_template(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["smollm"](tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        used_tokens([CHAT], tokenizer, len(tokenizer), chat)
    with pytest.raises(DataError, match="no text"):
        used_tokens([], tokenizer, len(tokenizer), chat)


def test_special_tokens_in_plain_text_are_text(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["smollm"](tmp_path)
    text = Document(text="the mark <|im_end|> in prose")
    counts = used_tokens([text], tokenizer, len(tokenizer), chat).counts
    bare = used_tokens([Document(text="the")], tokenizer, len(tokenizer), chat).counts
    assert counts[tokenizer.eos_token_id] == bare[tokenizer.eos_token_id]  # of the template alone
    _, pruned = prune(tokenizer, [text])
    check_same_tokens(tokenizer, pruned, [text], chat)


def test_a_difference_is_found(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["gpt2"](tmp_path)
    _, pruned = prune(tokenizer, [Document(text="xyz")])
    with pytest.raises(ModelError, match="splits a text of the domain differently, at token"):
        check_same_tokens(tokenizer, pruned, DOMAIN, chat)


def test_reserved_tokens_go_and_named_ones_stay(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = TOKENIZERS["gpt2"](tmp_path)
    names = ["<unused7>", "<|reserved_special_token_12|>", "<|fim|>", "<extra_id_3>"]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    kept, pruned = prune(tokenizer, DOMAIN)
    found = {tokenizer.convert_ids_to_tokens(number) for number in kept.tolist()}
    assert found & set(names) == {"<|fim|>"}
    assert pruned.encode("<|fim|>") == [pruned.convert_tokens_to_ids("<|fim|>")]


def test_expected_tokens_against_numpy(tmp_path: Path) -> None:
    import torch

    from edgeslm.stages.checkpoint import resolve

    model = resolve(str(write_hf_model(tmp_path, "gemma2"))).load()
    windows = np.random.default_rng(0).integers(0, 300, (2, 10))
    with torch.inference_mode():
        logits = model(torch.from_numpy(windows)).logits.double().numpy()
    wanted = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean((0, 1))
    np.testing.assert_allclose(expected_tokens(model, windows), wanted, rtol=1e-4)


def test_no_note_of_tokens_in_a_whole_model(tmp_path: Path) -> None:
    assert kept_tokens(tmp_path) is None
    np.save(tmp_path / "kept_tokens.npy", np.array([0, 4]))
    found = kept_tokens(tmp_path)
    assert found is not None
    assert found.tolist() == [0, 4]


# --- the model of a tokenizer.json ---


def byte_pairs(merges: list[tuple[str, str]], pieces: list[str]) -> Subwords:
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return Subwords({"model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]}})


def merged(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte pair encoding by its definition: all merges in turn, each as often as it applies, from the left.

    Sennrich et al. 2015, arXiv:1508.07909, algorithm 1.
    """
    symbols = list(text)
    for left, right in merges:
        at = 0
        while at < len(symbols) - 1:
            if (symbols[at], symbols[at + 1]) == (left, right):
                symbols[at : at + 2] = [left + right]
            at += 1
    return symbols


@given(
    st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
    st.integers(0, 14),
)
@settings(max_examples=150, deadline=None)
def test_the_parts_of_used_tokens_are_enough(words: list[str], random: Any, count: int) -> None:
    pieces, merges = ["a", "b", "c"], []
    for _ in range(count):
        pair = (random.choice(pieces), random.choice(pieces))
        if pair[0] + pair[1] not in pieces:
            merges.append(pair)
            pieces.append(pair[0] + pair[1])
    subwords = byte_pairs(merges, pieces)
    used = {token for word in words for token in merged(word, merges)}
    kept = subwords.closure(used)
    pruned = Subwords(subwords.without_others(subwords.ids[piece] for piece in kept))
    for word in words:
        assert merged(word, pruned.merges) == merged(word, merges)
    assert kept <= {"a", "b", "c"} | {piece for piece in pieces if any(piece in token for token in used)}


def test_parts_by_hand() -> None:
    subwords = byte_pairs(
        [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], ["a", "b", "c", "d", "ab", "bc", "abc", "dd"]
    )
    assert subwords.parts("abc") == {"a", "b", "c", "ab", "abc"}  # not by way of bc
    assert subwords.parts("dd") == {"dd"}  # no merge makes it: a whole word
    kept = sorted(subwords.ids[piece] for piece in subwords.closure({"abc", "dd"}))
    document = subwords.without_others(kept)
    assert document["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "abc": 5, "dd": 6}
    assert document["model"]["merges"] == [["a", "b"], ["ab", "c"]]


def test_merges_as_lines_and_post_processors() -> None:
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": ["a b"]},
        "added_tokens": [{"id": 4, "content": "<s>"}, {"id": 5, "content": "</s>"}],
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [4]}}},
                {"type": "BertProcessing", "sep": ["</s>", 5], "cls": ["<s>", 4]},
            ],
        },
    }
    assert special_ids(document) == {4, 5}
    pruned = Subwords(document).without_others([0, 1, 3, 4, 5])
    assert pruned["model"]["merges"] == [["a", "b"]]
    assert [token["id"] for token in pruned["added_tokens"]] == [3, 4]
    first, second = pruned["post_processor"]["processors"]
    assert first["special_tokens"]["<s>"]["ids"] == [3]
    assert (second["sep"], second["cls"]) == (["</s>", 4], ["<s>", 3])


def test_unigram_pieces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(LINES, trainer)
    document = json.loads(raw.to_str())
    subwords = Subwords(document)
    used = {token for line in LINES[:3] for token in raw.encode(line).tokens}
    kept = {subwords.ids[piece] for piece in subwords.closure(used)} | {subwords.added["<s>"]}
    assert len(kept) < len(subwords.ids)
    pruned = Tokenizer.from_str(json.dumps(subwords.without_others(kept)))
    for line in LINES[:3]:
        assert pruned.encode(line).tokens == raw.encode(line).tokens
    assert pruned.token_to_id("<unk>") == 0


def test_other_kinds_of_vocabulary_are_refused() -> None:
    with pytest.raises(ModelError, match="drop tokens of a WordPiece vocabulary"):
        Subwords({"model": {"type": "WordPiece", "vocab": {}}})
    with pytest.raises(ModelError, match="drop tokens"):
        Subwords({"model": {"type": "BPE", "vocab": {}, "end_of_word_suffix": "</w>"}})


def test_bytes_of_sentencepiece_stay(tmp_path: Path) -> None:
    document = tokenizer_document(TOKENIZERS["mistral"](tmp_path))
    always = Subwords(document).always()
    assert sum(bool(re.fullmatch("<0x..>", piece)) for piece in always) == 256
    assert "<unk>" in always
    assert not {piece for piece in always if len(piece) == 1 and not piece.isascii()} - {"▁"}
