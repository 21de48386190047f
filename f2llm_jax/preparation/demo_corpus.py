"""The embedded corpus: real multilingual rows in the raw F2LLM layout, made from what is installed, with no download.

Two things in the installed packages are parallel text: CLDR (shipped by `babel`) names the same languages, scripts,
territories and currencies in about 260 locales, and Python libraries pair docstrings with functions. From these, `build` writes

    OUT/raw/cldr_bitext.parquet       retrieval        a name -> its English name; one row in eight runs the other way
    OUT/raw/cldr_kind.parquet         clustering       a name -> another name of the same kind, in whatever language
    OUT/raw/script_direction.parquet  classification   a name -> "right-to-left script" | "left-to-right script"
    OUT/raw/python_code.parquet       retrieval        first paragraph of a docstring -> the function without it
    OUT/raw/tasks.json                {source: kind of task}, written last: where it is, the corpus is whole
    OUT/heldout/bitext.parquet        a name -> its English name
    OUT/heldout/zero_shot.parquet     a name -> the name of the same thing in another language, neither English
    OUT/heldout/code.parquet          docstring -> function
    OUT/tokenizer/                    byte-level BPE trained on the training rows, Hugging Face layout

A raw file has the string columns `query` (instruction included), `passage`, `negative_1` .. `negative_24` (classification:
`negative_1` alone) and `lang`. A held-out file has the string columns `query` (bare), `instruction`, `document`,
`language`, `document_language` and `kind`, and no raw file knows its queries: see `_split` and `_functions`.

Recall@1 is well defined on each held-out file, with its *distinct* documents as the pool: no query has two right answers
there. Documents are unique in `zero_shot` and `code`; in `bitext` they are unique within a language, and English names
recur between languages, so the pool there is the set of them.

Everything is a function of the seed and of packages that the extra `demo` pins: the same on every Python and machine, with no
clock, no hash order, no thread order.
"""

import dataclasses
import hashlib
import pathlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from babel import localedata
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from f2llm_jax import text
from f2llm_jax.preparation.library_code import Function, library_functions
from f2llm_jax.storage.files import write_json
from f2llm_jax.storage.folders import new_folder

TASKS = {"cldr_bitext": "retrieval", "cldr_kind": "clustering", "script_direction": "classification", "python_code": "retrieval"}
INSTRUCTIONS = {
    "cldr_bitext": "Retrieve translations of the following text.",
    "cldr_kind": "Identify what kind of thing the given name denotes.",
    "script_direction": "Classify the writing direction of the given text.",
    "python_code": "Given a description, retrieve the Python function that it describes.",
}
DIRECTIONS = ("left-to-right script", "right-to-left script")

NEGATIVES = 24
BITEXT_ROWS_PER_LANGUAGE = 300  # large locales would otherwise crowd out the small ones
FROM_ENGLISH = 1 / 40  # share of bitext rows whose query is the English name; their negatives are stored documents too
HARD_POOL = 48  # a row's negatives are drawn from so many nearest candidates
KINDS = {"languages": "language", "scripts": "script", "territories": "territory", "currency_names": "currency"}
MIN_NAMES = 50  # a locale with fewer names of its own cannot be both trained on and held out
HELDOUT_SHARE, HELDOUT_MIN = 0.06, 14  # of a language's concepts; a related language that trains on the same spelling costs some
ZERO_SHOT_PAIRS = 1_000
HELDOUT_FUNCTIONS = 500
KIND_ROWS_PER_LANGUAGE = 24
DIRECTION_ROWS = 3_000  # a direction
CODE_LANG = "eng-python"

VOCAB_SIZE = 8_192
PAD, START, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen's split, with combining marks kept in their word: \p{L} alone cuts every Indic word at each vowel sign.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Name:
    """What one locale calls one thing: `concept` is (kind, CLDR code), `english` the English name of it."""

    language: str
    concept: tuple[str, str]
    text: str
    english: str

    @property
    def kind(self) -> str:
        return self.concept[0]


def build(out: epath.PathLike, seed: int = 0, *, overwrite: bool = False) -> dict[str, pa.Table]:
    """Writes the corpus (layout: see the module) to the local folder `out` and returns its tables by relative path.

    Raises:
      FileError: `out` is not empty, and it is no corpus or `overwrite` is not set.
    """
    english, names = _cldr_names()
    train, held = _split(names, english, seed)
    functions, held_functions = _functions(seed)
    rng = np.random.default_rng(seed)
    raw = {
        "cldr_bitext": _bitext(_at_most(train, BITEXT_ROWS_PER_LANGUAGE, rng), english, rng),
        "cldr_kind": _kind(train, rng),
        "script_direction": _direction(train, rng),
        "python_code": _code(functions, rng),
    }
    heldout = {"bitext": _heldout_bitext(held), "zero_shot": _heldout_zero_shot(held, seed), "code": _heldout_code(held_functions)}
    tables = {f"raw/{name}": table for name, table in raw.items()} | {f"heldout/{name}": table for name, table in heldout.items()}
    with new_folder(out, "raw/tasks.json", overwrite) as folder:
        for path, table in tables.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, folder / f"{path}.parquet")
        _save_tokenizer(folder / "tokenizer", raw.values())
        write_json(folder / "raw" / "tasks.json", TASKS)
    return tables


# --- names -----------------------------------------------------------------------------------------------------------


def _cldr_names() -> tuple[dict[tuple[str, str], str], list[Name]]:
    """English names by concept, and every locale's own other names of the same concepts.

    Locales are base languages and their other scripts (no regions). `merge_inherited=False` leaves out what a locale only
    inherits. Left out as well: copies of the English name, letters with or without their diacritics (nothing to learn);
    currencies told apart by years; a name that denotes two things in its locale (no right answer).
    """
    data = localedata.load("en", merge_inherited=False)
    english = {(kind, code): name for key, kind in KINDS.items() for code, name in data[key].items() if not re.search(r"\d", name)}
    names = []
    for locale in sorted(filter(_is_own_language, localedata.locale_identifiers())):
        data = localedata.load(locale, merge_inherited=False)
        own = [
            Name(locale, (kind, code), name, english[kind, code])
            for key, kind in KINDS.items()
            for code, name in sorted(data.get(key, {}).items())
            if (kind, code) in english and _skeleton(name) != _skeleton(english[kind, code])
        ]
        meanings = Counter(fold(name.text) for name in own)
        own = [name for name in own if meanings[fold(name.text)] == 1]
        names += own if len(own) >= MIN_NAMES else []
    return english, names


def _is_own_language(locale: str) -> bool:
    language, *rest = locale.split("_")
    return language not in ("en", "root") and (not rest or (len(rest) == 1 and len(rest[0]) == 4))  # four letters: a script


def base_language(locale: str) -> str:
    """The language of a CLDR locale, without its script."""
    return locale.partition("_")[0]


def fold(name: str) -> str:
    """The spelling of `name` up to case and compatibility forms: two texts that fold alike count as the same text."""
    return unicodedata.normalize("NFKC", name).casefold()


def _skeleton(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if not unicodedata.combining(c))


def _split(names: Sequence[Name], english: dict[tuple[str, str], str], seed: int) -> tuple[list[Name], list[Name]]:
    """Training names and held-out names: disjoint in (language, concept) and, across all languages, in spelling.

    A seeded hash ranks the concepts of each language; the first few are held out, in all its scripts at once. Training
    then keeps each spelling once, whichever language comes first in a seeded order. Last, a held-out name that some
    other language trains on under the same spelling ("Alemania") has been seen after all, and is dropped; so is one
    that the held-out names of two languages use for two things.
    """
    ranked: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for name in names:
        language = base_language(name.language)
        ranked[language][name.concept] = _rank(seed, language, *name.concept)
    held_concepts = {
        (language, concept)
        for language, ranks in ranked.items()
        for concept in sorted(ranks, key=ranks.__getitem__)[: max(HELDOUT_MIN, round(HELDOUT_SHARE * len(ranks)))]
    }
    is_held = [(base_language(name.language), name.concept) in held_concepts for name in names]
    trained: dict[str, Name] = {}
    for name in sorted((n for n, h in zip(names, is_held, strict=True) if not h), key=lambda n: _rank(seed, n.language, *n.concept)):
        trained.setdefault(fold(name.text), name)
    seen = trained.keys() | {fold(name) for name in english.values()}
    held = [name for name, h in zip(names, is_held, strict=True) if h and fold(name.text) not in seen]
    meanings = defaultdict(set)
    for name in held:
        meanings[fold(name.text)].add(name.english)
    return list(trained.values()), [name for name in held if len(meanings[fold(name.text)]) == 1]


def _rank(seed: int, *parts: str) -> str:
    return hashlib.sha256("\0".join((str(seed), *parts)).encode()).hexdigest()


# --- functions -------------------------------------------------------------------------------------------------------


def _functions(seed: int) -> tuple[list[Function], list[Function]]:
    """Training and held-out functions, each in library order; no docstring and no code occurs twice in the two together."""
    unique: dict[str, Function] = {}
    codes = set()
    for function in library_functions():
        docstring = fold(function.docstring)
        if docstring not in unique and function.code not in codes:
            unique[docstring] = function
            codes.add(function.code)
    held = set(sorted(unique, key=lambda docstring: _rank(seed, docstring))[:HELDOUT_FUNCTIONS])
    return [f for d, f in unique.items() if d not in held], [f for d, f in unique.items() if d in held]


# --- raw sources -----------------------------------------------------------------------------------------------------


def _bitext(names: Sequence[Name], english: dict[tuple[str, str], str], rng: np.random.Generator) -> pa.Table:
    """One row a name: to English against the English names spelt most alike, or from English against its own language.

    The second only where its language has names enough of its kind.
    """
    concepts = list(english)
    texts = [*english.values(), *(name.text for name in names)]
    concept_of = {concept: i for i, concept in enumerate(concepts)}
    theirs = np.array([concept_of[name.concept] for name in names])
    ours = len(concepts) + np.arange(len(names))
    to_english = rng.random(len(names)) >= FROM_ENGLISH
    negatives = np.zeros((len(names), NEGATIVES), np.int64)
    for _, peers in _groups([f"{name.language} {name.kind}" for name in names]):
        if len(peers) <= NEGATIVES:
            to_english[peers] = True
            continue
        rows = peers[~to_english[peers]]
        negatives[rows] = _others(rng, ours[rows], ours[peers])
    hard = _spelt_alike(concepts, english)
    for concept, same in _groups(theirs):
        rows = same[to_english[same]]
        negatives[rows] = _others(rng, theirs[rows], hard[concept])
    query, passage = np.where(to_english, ours, theirs), np.where(to_english, theirs, ours)
    # "Nepali" is some language's name of Nepal, and "Nepal" another's of Nepali: the same pair in both directions.
    pairs = [(texts[q], texts[p]) for q, p in zip(query, passage, strict=True)]
    first = sorted({pair: row for row, pair in reversed(list(enumerate(pairs)))}.values())
    languages = [names[row].language for row in first]
    return _raw_table("cldr_bitext", texts, query[first], passage[first], negatives[first], languages)


def _at_most(names: Sequence[Name], limit: int, rng: np.random.Generator) -> list[Name]:
    """A random `limit` of each language's names, in their order; all where there are no more."""
    kept: list[int] = []
    for _, theirs in _groups([name.language for name in names]):
        kept.extend(rng.permutation(theirs)[:limit])
    return [names[i] for i in sorted(kept)]


def _spelt_alike(concepts: Sequence[tuple[str, str]], english: dict[tuple[str, str], str]) -> np.ndarray:
    """Positions `[len(concepts), HARD_POOL]` of the same kind's names, best Jaccard overlap of character trigrams first."""
    grams = [_trigrams(english[concept]) for concept in concepts]
    nearest = np.zeros((len(concepts), HARD_POOL), np.int64)
    for kind in KINDS.values():
        members = [i for i, concept in enumerate(concepts) if concept[0] == kind]
        for i in members:
            overlap = [-1.0 if i == j else len(grams[i] & grams[j]) / len(grams[i] | grams[j]) for j in members]
            nearest[i] = np.array(members)[np.argsort(overlap, stable=True)[::-1][:HARD_POOL]]
    return nearest


def _trigrams(name: str) -> set[str]:
    padded = f"  {fold(name)} "  # two spaces: a common first letter counts
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def _kind(names: Sequence[Name], rng: np.random.Generator) -> pa.Table:
    """An equal number of anchors a language; the positive is from it or from any other, even odds, the negatives from it."""
    texts = [name.text for name in names]
    kinds = np.array([name.kind for name in names])
    of_kind = {kind: np.flatnonzero(kinds == kind) for kind in KINDS.values()}
    anchors, positives, negatives = [], [], []
    for _, members in _groups([name.language for name in names]):
        for anchor in rng.permutation(members)[:KIND_ROWS_PER_LANGUAGE]:
            here = members[kinds[members] == kinds[anchor]]
            pool = here if len(here) > 1 and rng.random() < 0.5 else of_kind[kinds[anchor]]
            others = members[kinds[members] != kinds[anchor]]
            if len(others) >= NEGATIVES:
                anchors.append(anchor)
                positives.append(rng.choice(pool[pool != anchor]))
                negatives.append(rng.permutation(others)[:NEGATIVES])
    return _raw_table("cldr_kind", texts, np.array(anchors), np.array(positives), np.array(negatives), [names[i].language for i in anchors])


def _direction(names: Sequence[Name], rng: np.random.Generator) -> pa.Table:
    """As many right-to-left names as left-to-right ones, in alternating order."""
    directions = np.array([_direction_of(name.text) for name in names])
    chosen = [rng.permutation(np.flatnonzero(directions == direction)) for direction in (0, 1)]
    rows = np.stack([indices[: min(DIRECTION_ROWS, *map(len, chosen))] for indices in chosen], axis=1).reshape(-1)
    texts = [*DIRECTIONS, *(name.text for name in names)]
    label = directions[rows]
    return _raw_table("script_direction", texts, len(DIRECTIONS) + rows, label, 1 - label[:, None], [names[i].language for i in rows])


def _direction_of(name: str) -> int:
    """0 for left to right, 1 for right to left, -1 where Unicode's bidirectional classes of the letters disagree."""
    strong = {c in ("R", "AL") for c in map(unicodedata.bidirectional, name) if c in ("L", "R", "AL")}
    return int(strong.pop()) if len(strong) == 1 else -1


def _code(functions: Sequence[Function], rng: np.random.Generator) -> pa.Table:
    """Negatives are the neighbours in library order, hence of the same module or package."""
    texts = [f.docstring for f in functions] + [f.code for f in functions]
    codes = len(functions) + np.arange(len(functions))
    first = np.clip(np.arange(len(functions)) - HARD_POOL // 2, 0, len(functions) - HARD_POOL - 1)
    negatives = [_others(rng, codes[i : i + 1], codes[first[i] : first[i] + HARD_POOL + 1])[0] for i in range(len(functions))]
    return _raw_table("python_code", texts, codes - len(functions), codes, np.array(negatives), [CODE_LANG] * len(functions))


def _groups(keys: Sequence[str] | np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Each distinct key, in sorted order, with the positions at which it occurs."""
    values, group = np.unique(np.asarray(keys), return_inverse=True)
    positions = np.split(np.argsort(group, stable=True), np.cumsum(np.bincount(group))[:-1])
    return zip(values, positions, strict=True)


def _others(rng: np.random.Generator, positives: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """For each of `positives` `[N]`, `NEGATIVES` distinct members of `pool` `[M]` other than itself: `[N, NEGATIVES]`."""
    draws = rng.random((len(positives), len(pool)))
    draws[positives[:, None] == pool] = 2  # beyond every draw
    return pool[np.argsort(draws, axis=1)[:, :NEGATIVES]]


def _raw_table(source: str, texts: list[str], query: np.ndarray, passage: np.ndarray, negatives: np.ndarray, lang: list[str]) -> pa.Table:
    """Raw layout of rows given as positions in `texts`: `query` `[N]`, `passage` `[N]`, `negatives` `[N, 24 or 1]`."""
    pool = pa.array(texts, pa.string())
    prompt = text.query_prompt(INSTRUCTIONS[source])
    columns = {"query": pa.array([prompt + texts[i] for i in query]), "passage": pool.take(pa.array(passage))}
    columns |= {f"negative_{i + 1}": pool.take(pa.array(column)) for i, column in enumerate(negatives.T)}
    return pa.table(columns | {"lang": pa.array(lang)})


# --- held out --------------------------------------------------------------------------------------------------------


def _heldout_bitext(held: Sequence[Name]) -> pa.Table:
    once = {(name.language, name.english): name for name in held}  # "Arabic" is a language and a script
    rows = [(name.text, name.english, name.language, "en", name.kind) for name in once.values()]
    return _heldout_table(INSTRUCTIONS["cldr_bitext"], rows)


def _heldout_zero_shot(held: Sequence[Name], seed: int) -> pa.Table:
    """At most one pair an English name, so that a query has one right document in the whole pool; no text is used twice."""
    by_concept = defaultdict(list)
    for name in sorted(held, key=lambda name: _rank(seed, "zero shot", name.language, *name.concept)):
        by_concept[name.concept].append(name)
    used: set[str] = set()
    rows = []
    for concept in sorted(by_concept, key=lambda concept: _rank(seed, "zero shot", *concept)):
        query, *others = by_concept[concept]
        for document in others:
            spellings = {_skeleton(query.text), _skeleton(document.text), _skeleton(query.english)}
            if base_language(document.language) != base_language(query.language) and len(spellings) == 3 and not spellings & used:
                used |= spellings
                rows.append((query.text, document.text, query.language, document.language, query.kind))
                break
    return _heldout_table(INSTRUCTIONS["cldr_bitext"], rows[:ZERO_SHOT_PAIRS])


def _heldout_code(functions: Sequence[Function]) -> pa.Table:
    return _heldout_table(INSTRUCTIONS["python_code"], [(f.docstring, f.code, "eng", "python", "function") for f in functions])


def _heldout_table(instruction: str, rows: Sequence[tuple[str, str, str, str, str]]) -> pa.Table:
    query, document, language, document_language, kind = zip(*rows, strict=True)
    columns = {"query": query, "instruction": [instruction] * len(rows), "document": document}
    columns |= {"language": language, "document_language": document_language, "kind": kind}
    return pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _save_tokenizer(folder: pathlib.Path, tables: Iterable[pa.Table]) -> None:
    """Trains on every query (prompts in the weight they have in training) and every distinct passage.

    Like Qwen3's, the tokenizer does not end a text in EOS by itself: `text.load_tokenizer` sees to that.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    columns = [column for table in tables for column in (table["query"], table["passage"].unique())]
    backend.train_from_iterator((column.to_pylist() for column in columns), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [START, EOS],
    }
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 1024}
    write_json(folder / "tokenizer_config.json", config)
