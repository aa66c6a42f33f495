"""Rows, tokens and scores of the causal program."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("transformers")

import transformers

from benchmarks.examples.causal import data, encoding, losses, models, number_words, scoring
from benchmarks.examples.causal.data import Example
from benchmarks.examples.causal.encoding import Encoded
from benchmarks.examples.causal.feed import Feed

CHARACTERS = ["<pad>", "<eos>", "<unk>", *"0123456789+= #"]


def ids(text: str) -> list[int]:
    return [CHARACTERS.index(c) for c in text]


@pytest.fixture
def tokenizer(base: Path, offline: None) -> Any:
    return models.load_tokenizer(base)


# ------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### 1,234.50 dollars", "1234.50"),
        ("#### 7 of 9", "9"),  # the last number behind the marker
        ("#### 3\nno: #### -4", "-4"),  # the last marker
        ("#### 18\nThe answer is: $19.", "19"),
        ("first 3, then 4, so 7 apples", "7"),
        ("10-4", "4"),
        ("it is .5", "0.5"),
        ("none at all", None),
        ("2 of them\n#### none", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert scoring.final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value_texts_by_words() -> None:
    asked = ["42", "42", "x", "a b"]
    found = ["#### 42.0", "41", "no number", "a  b\n"]
    assert scoring.is_right("number", found, asked) == [True, False, False, False]
    assert scoring.is_right("text", found, asked) == [False, False, False, True]


# --------------------------------------------------------------------------------------------- rows
def test_rows_take_many_forms_in_lines_and_in_an_array(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"prompt": "p", "response": "r"},
        {"query": "q", "response": "r", "type": "x"},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "input": "i", "output": "a"},
        {"messages": chat},
    ]
    template = "Question: q Think step by step.\nAnswer:"
    wanted = [
        Example("p", "r"),
        Example(template, " r"),
        Example(template, " a"),
        Example(template.replace("q ", "q\ni "), " a"),
        Example((("user", "u"),), "a"),  # type: ignore[arg-type]
    ]
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert data.read(lines) == data.read(array) == wanted
    assert data.read(lines, 2) == wanted[:2]
    assert data.data_hash(wanted) == data.data_hash(data.read(array)) != data.data_hash(wanted[1:])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "p", "response": "r"}\n\n{"prompt": "p"}', "line 3: expected an object with"),
        ("{", "line 1: not JSON"),
        ("[1", "not JSON"),
        ('[{"messages": [{"role": "user", "content": "u"}]}]', "row 1: messages: expected two or"),
        ("", "found none"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "rows"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=said):
        data.read(file)


def test_a_split_holds_out_a_part_and_loses_nothing() -> None:
    rows = [Example(str(i), "r") for i in range(10)]
    learned, held_out = data.split(rows, 0.3, 0)
    assert len(held_out) == 3
    assert sorted(learned + held_out) == rows
    assert data.split(rows, 0.3, 1)[1] != held_out


def test_number_words_are_all_different() -> None:
    pytest.importorskip("num2words")
    train, test = number_words.numbers("de", [50, 20], 0)
    assert len({example.response for example in train + test}) == 70
    assert all(e.prompt.startswith("Question: Write ") for e in test)
    with pytest.raises(SystemExit, match="doesn't know the language 'xx'"):
        number_words.numbers("xx", [1], 0)


# ------------------------------------------------------------------------------------------- tokens
def test_labels_are_the_response_and_its_end_alone(tokenizer: Any) -> None:
    rows = [encoding.encode(tokenizer, Example(p, r)) for p, r in (("1", "2"), ("1+1=", "2"))]
    batch = encoding.padded(rows, 0)
    assert batch["input_ids"].tolist() == [[*ids("12"), 1, 0, 0, 0], [*ids("1+1=2"), 1]]
    assert batch["labels"].tolist() == [
        [-100, *ids("2"), 1, -100, -100, -100],
        [-100] * 4 + [*ids("2"), 1],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]


def test_a_chat_goes_through_the_template_and_ends_once(tokenizer: Any) -> None:
    turns = (data.Message("user", "1"), data.Message("assistant", "2"), data.Message("user", "3"))
    chat = encoding.encode(tokenizer, Example(turns, "4"))
    assert tokenizer.decode(chat.ids) == "+1=2<eos>+3=4<eos>"
    assert tokenizer.decode(chat.ids[chat.start :]) == "4<eos>"
    plain = encoding.encode(tokenizer, Example("1 ", " 2"), chat=True)
    assert tokenizer.decode(plain.ids) == "+1=2<eos>"
    tokenizer.chat_template = None
    with pytest.raises(SystemExit, match="has no chat template"):
        encoding.encode(tokenizer, Example(turns, "4"))


def test_what_is_too_long_is_dropped_or_cut_and_said() -> None:
    rows = [Encoded([1] * 4, 2), Encoded([1] * 6, 2), Encoded([1] * 6, 5)]
    assert encoding.kept(rows, 6, "drop") == (rows, "")
    found, said = encoding.kept(rows, 5, "drop")
    assert (found, said) == (rows[:1], "2 dropped (longer than 5 tokens)")
    found, said = encoding.kept(rows, 5, "truncate")
    assert (found, said) == (
        [rows[0], Encoded([1] * 5, 2)],
        "1 responses cut and 1 dropped (longer than 5 tokens)",
    )


def test_packs_lose_nothing_and_fit() -> None:
    rows = [Encoded([1] * n, 1) for n in (2, 7, 3, 5, 4, 8)]
    groups = encoding.packs(rows, 10)
    assert sorted(r for group in groups for r in group) == sorted(rows)
    sizes = [sum(len(row.ids) for row in group) for group in groups]
    assert max(sizes) <= 10
    assert len(groups) == 3


def test_packed_examples_cost_what_they_cost_alone(base: Path, tokenizer: Any) -> None:
    model = models.load_model(base, device="cpu")
    texts = (("1+1=", "2"), ("9=", "6+3"), ("4+", "4"), ("7", "0"))
    rows = [encoding.encode(tokenizer, Example(p, r)) for p, r in texts]
    alone, _ = losses.row_losses(model, (), encoding.padded(rows, 0))
    packed, counts = losses.row_losses(model, (), encoding.packed([rows[:3], rows[3:]], 0))
    assert counts.tolist() == [2 + 4 + 2, 2]
    assert packed.tolist() == pytest.approx([alone[:3].sum().item(), alone[3].item()], rel=1e-5)
    losses.check_packing(model, rows, 0, "cpu")


def test_a_model_that_mixes_packed_examples_is_refused(tokenizer: Any) -> None:
    size = {"vocab_size": 20, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    config = transformers.BloomConfig(**size, initializer_range=1.0)
    model = transformers.BloomForCausalLM(config).eval()  # its attention knows no positions
    rows = [encoding.encode(tokenizer, Example(p, r)) for p, r in (("1+1=", "2"), ("9=", "6"))]
    with pytest.raises(SystemExit, match="--pack: BloomForCausalLM lets packed examples see each"):
        losses.check_packing(model, rows, 0, "cpu")


@pytest.mark.parametrize("width", [None, 12])
def test_a_batch_depends_on_its_number_alone(width: int | None) -> None:
    rows = [Encoded([i] * (2 + i % 5), 1) for i in range(1, 12)]
    one, other = (Feed(rows, batch=2, pad=0, seed=3, width=width) for _ in range(2))
    forwards = [one(i)["input_ids"].tolist() for i in range(9)]
    assert [other(i)["input_ids"].tolist() for i in reversed(range(9))] == forwards[::-1]
    assert {n for batch in forwards[:6] for row in batch for n in row} >= set(range(1, 12))
