"""The parts of synthetic data alone: passages, checks, duplicates, turns, styles."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.config import ChecksConfig, DedupConfig, Template
from trinity.synthesis.checks import Benchmarks, copied, left_out, repetition
from trinity.synthesis.duplicates import GRAM, Duplicates, rows_for, signature_P
from trinity.synthesis.passages import passages
from trinity.synthesis.styles import BUILT_IN, chosen, hash_of, question
from trinity.synthesis.turns import turns
from trinity.synthesis.words import grams_G, units
from trinity.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(iter(["the quick brown fox jumps over the lazy dog. " * 20]), 300)
WORDS = [f"w{number}" for number in range(400)]
PASSAGE = (
    "The river rises in the northern hills and flows past the old mill to the harbour, where copper was once loaded."
)
TEMPLATE = Template(prompt="{text}", length_ratio=(0.2, 3))
NONE = Benchmarks((), 13)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab. \n\t漢é\0", max_size=300), st.integers(1, 30))
def test_passages_are_the_text_in_pieces_that_fit(text, most):
    found = list(passages(text, TOKENIZER, most))
    assert "".join(found) == text
    assert all(found)
    for passage in found:
        assert len(passage) == 1 or len(TOKENIZER.encode(passage)) <= 2 * most


def test_passages_end_with_paragraphs_then_lines_sentences_and_words():
    paragraphs = ["the quick fox. " * 3 + "\n\n", "over the dog. " * 3 + "\n\n", "lazy jumps. " * 4]
    size = [len(TOKENIZER.encode(each)) for each in paragraphs]
    assert list(passages("".join(paragraphs), TOKENIZER, sum(size))) == ["".join(paragraphs)]
    assert list(passages("".join(paragraphs), TOKENIZER, size[0] + size[1])) == ["".join(paragraphs[:2]), paragraphs[2]]
    assert list(passages("".join(paragraphs), TOKENIZER, max(size))) == paragraphs
    assert list(passages("one line\nanother\n", TOKENIZER, 9)) == ["one line\n", "another\n"]
    assert all(piece.endswith((". ", ".")) for piece in passages("The fox. The dog. The fox jumps.", TOKENIZER, 8))
    assert all(piece.endswith(" ") for piece in list(passages("quick brown fox " * 9, TOKENIZER, 6))[:-1])


def test_words_without_spaces_are_characters():
    assert units("Ein_Wort, zwei! 漢字 ok") == ["ein", "wort", "zwei", "漢", "字", "ok"]


def test_grams_tell_runs_apart_and_know_equal_ones():
    words = random.Random(0).choices(WORDS, k=3000)
    found = grams_G(words, 3)
    runs = [tuple(words[at : at + 3]) for at in range(len(found))]
    assert len(found) == 2998
    assert len(set(found.tolist())) == len(set(runs))
    assert grams_G(words[7:20], 3).tolist() == found[7:18].tolist()
    assert len(grams_G(words[:2], 3)) == 0


def reason(answer, finish="stop", template=TEMPLATE, known=NONE, passage=PASSAGE, **checks):
    return left_out(answer, finish, passage, template, ChecksConfig(**checks), known)


GOOD = "Fed by hills up north, this stream runs by a mill and ends at a port from which ships used to carry copper."


SORRY = "I\u2019m sorry, but I cannot rewrite a text that tells of rivers, mills and harbours."


@pytest.mark.parametrize(
    ("answer", "finish", "why", "off"),
    [
        (GOOD, "stop", None, {}),
        ("  \n", "stop", "empty", {}),
        (GOOD, "length", "cut off", {"whole": False}),
        (GOOD, "content_filter", "ended by content_filter", {"whole": False}),
        ("Short.", "stop", "length", {}),
        (GOOD * 4, "stop", "length", {}),
        (SORRY, "stop", "refusal", {"refusals": ()}),
        ("Река берёт начало в северных холмах и течёт мимо старой мельницы к гавани.", "stop", "script", {"same_script": None}),
        ("the river and the mill and " * 3, "stop", "repetition", {"max_repetition": None}),
        (PASSAGE, "stop", "copied", {"max_copied": None}),
        (PASSAGE + " It still is.", "stop", "copied", {"max_copied": 0.99}),
    ],
)  # fmt: skip
def test_each_check_finds_its_fault_and_can_be_switched_off(answer, finish, why, off):
    assert reason(answer, finish) == why
    if off:
        assert reason(answer, finish, **off) is None


def test_a_passage_of_two_scripts_may_be_answered_in_both():
    passage = "Река flows north. Она длинная and wide, и холодная, says the map."
    assert reason("Длинная и холодная река flows on.", passage=passage) is None
    assert reason("漢字漢字漢字漢字 only 仮名仮名仮名仮名仮名仮名", passage=passage) == "script"


def test_shares_of_repetition_and_copies():
    assert repetition(WORDS[:50]) == 0
    assert repetition(["a"] * 23) == pytest.approx(19 / 20)
    assert repetition(["a"]) == 0
    half = WORDS[:50]
    assert copied([*half, *WORDS[100:157]], half) == pytest.approx(43 / 100)
    assert copied(WORDS[3:6], half) == 1, "a short answer that the passage has whole"
    assert copied([], half) == 0


def test_questions_of_benchmarks_are_found_wherever_they_stand(tmp_path):
    asked, short = " ".join(WORDS[:20]), " ".join(WORDS[30:39])
    (tmp_path / "tasks.jsonl").write_text(
        json.dumps({"id": 1, "deep": {"choices": [asked, "yes"]}, "more": short}) + "\n"
    )
    (tmp_path / "text.txt").write_text(" ".join(WORDS[50:70]))
    known = Benchmarks.of([str(tmp_path)], 13)
    around = " ".join(WORDS[200:230])
    assert known.has_some_of(units(f"{around} {' '.join(WORDS[3:16]).upper()}, {around}"))
    assert not known.has_some_of(units(f"{around} {' '.join(WORDS[3:15])} {around}"))
    assert known.has_some_of(units(f"{around} {short}! {around}"))
    assert not known.has_some_of(units(f"{around} {short[:-4]} {around} yes"))
    assert known.has_some_of(WORDS[55:69])
    assert not NONE.has_some_of(WORDS)
    wide = Template(prompt="{text}", length_ratio=(0, 99))
    assert reason(f"{around} {asked}", template=wide, known=known, same_script=None) == "benchmark"


def jaccard(one, other):
    a, b = (set(grams_G(units(text), GRAM).tolist()) for text in (one, other))
    return len(a & b) / len(a | b)


def test_minhash_estimates_jaccard_similarity():
    """Of 60 pairs at every similarity: the mean error is near 0, and no error above five standard deviations."""
    chance, errors = random.Random(1), []
    for number in range(60):
        words = chance.choices(WORDS, k=200)
        other = [chance.choice(WORDS) if chance.random() < number / 300 else word for word in words]
        one, two = " ".join(words), " ".join(other)
        errors.append((signature_P(one) == signature_P(two)).mean() - jaccard(one, two))
    assert abs(np.mean(errors)) < 0.02
    assert np.abs(errors).max() < 5 * 0.045


def test_near_duplicates_are_found_and_others_stay():
    chance, found = random.Random(2), Duplicates(DedupConfig(near=0.7))
    texts = [" ".join(chance.choices(WORDS, k=120)) for _ in range(100)]
    for text in texts:
        assert found.reason_of(text) is None
        found.add(text)
    for text in texts:
        assert found.reason_of(text) == "duplicate"
        assert found.reason_of(text + " and an end") == "near duplicate"
        words = text.split()
        assert found.reason_of(" ".join(words[::-1])) is None
        assert found.reason_of(" ".join(words[:40] + chance.choices(WORDS, k=80))) is None


def test_duplicates_can_be_kept():
    exact, none = Duplicates(DedupConfig(near=None)), Duplicates(DedupConfig(exact=False, near=None))
    for found in (exact, none):
        found.add("one text")
    assert [exact.reason_of("one text"), exact.reason_of("one text!"), none.reason_of("one text")] == [
        "duplicate",
        None,
        None,
    ]
    assert Duplicates(DedupConfig()).reason_of("") is None


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_what_is_as_like_as_the_threshold(threshold):
    rows = rows_for(threshold)
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.95
    assert 128 % rows == 0


@pytest.mark.parametrize(
    ("answer", "roles"),
    [
        ("Question: Who?\nAnswer: I.", "ua"),
        ("**Question 1:** Who?\nWhere?\n\n**Answer 1:** I.\n2) Q: When?\n A: Now,\nor later.", "uaua"),
        ("User: hi\nAssistant: hello\nUser: why?\nAssistant: because: so.", "uaua"),
        ("Problem: 2 + 2\nSolution: 4", "ua"),
        ("Here they are.\nQuestion: Who?\nAnswer: I.", None),
        ("Question: Who?\nQuestion: Where?\nAnswer: I.", None),
        ("Question: Who?\nAnswer: I.\nQuestion: When?", None),
        ("Question: Who?\nAnswer:", None),
        ("Answer: I.\nQuestion: Who?", None),
        ("no turns", None),
        ("", None),
    ],
)  # fmt: skip
def test_turns_of_answers(answer, roles):
    found = turns(answer)
    assert (found and "".join(each["role"][0] for each in found)) == roles
    if found and "why" in answer:
        assert found[-1]["content"] == "because: so."


def test_a_lone_letter_in_an_answer_is_no_label():
    assert turns("Question: What is set?\nAnswer: Two names.\na: 5\nq: 7")[1]["content"] == "Two names.\na: 5\nq: 7"


def test_every_built_in_style_asks_about_the_passage():
    for style, template in BUILT_IN.items():
        found = question((0, 0), 0, style, template, "A {brace} text.", 0)
        assert "A {brace} text." in found.prompt
        assert "{" not in found.prompt.replace("{brace}", "")
        assert 0 <= found.seed < 2**31


def test_a_changed_template_has_another_hash_and_other_seeds():
    one = BUILT_IN["qa"]
    other = one.model_copy(update={"temperature": 0.1})
    assert hash_of(one) != hash_of(other)
    assert question((0, 0), 0, "qa", one, PASSAGE, 0).seed != question((0, 0), 0, "qa", other, PASSAGE, 0).seed


def test_styles_by_chance_are_the_passages_own():
    drawn = [tuple(style for _, style in chosen(BUILT_IN, 2, f"passage {n}", 0)) for n in range(300)]
    assert drawn == [tuple(style for _, style in chosen(BUILT_IN, 2, f"passage {n}", 0)) for n in range(300)]
    assert {style for pair in drawn for style in pair} == set(BUILT_IN)
    assert all(len(set(pair)) == 2 for pair in drawn)
    assert len(chosen(BUILT_IN, None, PASSAGE, 0)) == len(BUILT_IN)
