"""Truncation and EOS: property tests on two awkward tokenizers, and against transformers reading the saved folder."""

import functools
import json

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_raw import EOS, PAD, write_tokenizer

from f2llm_jax import text
from f2llm_jax.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda value: EOS not in value and PAD not in value)


@pytest.fixture(scope="module", params=["plain", "eos_is_pad", "appends_eos"])
def folder(request, tmp_path_factory):
    options = {"plain": {}, "eos_is_pad": {"pad": EOS}, "appends_eos": {"appends_eos": True}}[request.param]
    return write_tokenizer(tmp_path_factory.mktemp("text") / request.param, **options)


@given(value=TEXTS)
@settings(max_examples=60, deadline=None)
def test_eos_ends_every_text_once_around_the_limit(folder, value):
    tokenizer = load(folder)
    bare = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(value, add_special_tokens=False).ids
    whole = [*bare, tokenizer.end_id]
    for max_length in {max(1, len(whole) + offset) for offset in (-1, 0, 1)} | {1}:
        (ids,) = tokenizer.encode([value], max_length)
        assert ids.dtype == np.int32
        assert ids.tolist() == (whole if len(whole) <= max_length else [*whole[: max_length - 1], tokenizer.end_id])
        assert ids.tolist().count(tokenizer.end_id) == 1


@given(values=st.lists(TEXTS, min_size=1, max_size=5), max_length=st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_the_saved_folder_gives_the_same_ids_in_transformers(folder, values, max_length):
    peer = transformers_of(folder)
    expected = [peer(value, truncation=True, max_length=max_length)["input_ids"] for value in values]
    assert [ids.tolist() for ids in load(folder).encode(values, max_length)] == expected


def test_a_batch_is_its_texts_one_by_one(folder):
    values = ["", "the cat", "猫坐在垫子上 " * 9, "die Katze saß"]
    together = load(folder).encode(values, 16)
    for value, ids in zip(values, together, strict=True):
        np.testing.assert_array_equal(ids, load(folder).encode([value], 16)[0])


def test_saving_keeps_the_fingerprint_and_max_length_must_hold_the_eos(folder, tmp_path):
    tokenizer = load(folder)
    tokenizer.save(tmp_path)
    assert text.load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="at least 1"):
        tokenizer.encode(["a"], 0)


def test_a_tokenizer_that_names_no_eos_or_is_not_there_is_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": PAD}))
    with pytest.raises(UserError, match="eos_token"):
        text.load_tokenizer(folder)
    with pytest.raises(UserError, match="does not exist"):
        text.load_tokenizer(tmp_path / "nowhere")


@given(instruction=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1, max_size=30), value=TEXTS)
def test_stripping_undoes_the_prompt(instruction, value):
    assert text.strip_instruction(text.query_prompt(instruction) + value) == value


def test_a_text_without_instruction_stays():
    assert text.query_prompt("") == ""
    assert text.strip_instruction("Query: Instruct: x") == "Query: Instruct: x"


@functools.cache
def load(folder):
    return text.load_tokenizer(folder)


@functools.cache
def transformers_of(folder):
    """What transformers makes of the folder this project saves."""
    saved = folder.with_name(folder.name + "_saved")
    load(folder).save(saved)
    return transformers.AutoTokenizer.from_pretrained(saved)
