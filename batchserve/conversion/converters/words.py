"""Vectorizers of texts, where skl2onnx has no way: letters within words, pairs across stop words, logarithms."""

import re
from typing import Any

import numpy as np

from batchserve.conversion.converters.tape import EXAMPLES, Expression, Tape, Value
from batchserve.errors import ConversionFailed

_PAD = "batchserve:pad"
"""Fills up the letters of shorter words; no single letter, so it is part of no n-gram that counts."""
_END = "\u2063"
"""A word behind each text, and behind shorter texts, so that there is always one; taken out again."""
_WORD = r"[^\pZ\s\x0b\x1c-\x1f\x{85}]+"
"""Of whatever Python's `split` does not take for a blank."""


def counts(tape: Tape, model: Any) -> Expression:
    """CountVectorizer with char_wb, or with stop words that stand between the words of a pair."""
    if model.strip_accents is not None or model.preprocessor is not None or model.tokenizer is not None:
        raise ConversionFailed(
            f"{type(model).__name__} with strip_accents, a preprocessor or a tokenizer has no ONNX converter. Prepare "
            "the texts before the pipeline."
        )
    number = _letters_within_words(tape, model) if model.analyzer == "char_wb" else _words_without_stops(tape, model)
    return (number > 0).to("f") if model.binary else number


def tf_idf(tape: Tape, model: Any) -> Expression:
    """TfidfVectorizer with char_wb or sublinear_tf: the counts, and what scikit-learn does to them."""
    from sklearn.feature_extraction.text import CountVectorizer

    if needs_letters_or_pairs(model):
        number = counts(tape, model)
    else:
        plain = CountVectorizer(**{name: getattr(model, name) for name in CountVectorizer().get_params()})
        plain.vocabulary_, plain.fixed_vocabulary_ = model.vocabulary_, model.fixed_vocabulary_
        number = tape.rows(tape.part(plain)[-1], len(model.vocabulary_))
    if model.sublinear_tf:
        number = np.where(number > 0, np.log(np.maximum(number, 1.0)) + 1.0, 0.0)
    if model.use_idf:
        number = number * model.idf_
    if model.norm is None:
        return number
    size = np.sqrt((number * number).sum(axis=1, keepdims=True)) if model.norm == "l2" else np.abs(number).sum(1, True)
    return number / np.where(np.equal(size, 0), 1.0, size)


def needs_letters_or_pairs(model: Any) -> bool:
    pairs = model.analyzer == "word" and model.stop_words is not None and model.ngram_range[1] > 1
    return bool(model.analyzer == "char_wb" or pairs)


def needs_more(model: Any) -> bool:
    return bool(needs_letters_or_pairs(model) or model.sublinear_tf)


def token_expression(vectorizer: Any) -> str | None:
    """The pattern of a word in the graph's dialect (RE2), whose own `\\w` ends at the first umlaut.

    Without it, the converter also counts words of one letter, which the usual pattern leaves out, into pairs of words.
    None, the converter's default, for anything but words of a minimal length.
    """
    if vectorizer.analyzer != "word" or vectorizer.tokenizer is not None:
        return None
    word = vectorizer.token_pattern.removeprefix("(?u)").removeprefix(r"\b").removesuffix(r"\b")
    if word == r"\S+":
        return _WORD
    return word.replace(r"\w", r"[\pL\pN_]") if re.fullmatch(r"(\\w)+\+", word) else None


def _letters_within_words(tape: Tape, model: Any) -> Expression:
    """How often each n-gram of the vocabulary occurs: [N, vocabulary].

    The letters of all words of a text in one row, each word between blanks. Two blanks meet only where words do, and
    no n-gram of the vocabulary has them, so none is counted across words.
    """
    text = _text(tape, model)
    some = text.example
    nothing, blank, end = (tape.constant(np.array(text)) for text in ("", " ", f" {_END}"))
    text = tape.node("StringConcat", text, end, example=some, version=20)
    words = tape.node(
        "Tokenizer", text, example=some[:, None], domain="com.microsoft", version=1, mark=0, mincharnum=1,
        pad_value=_END, tokenexp=_WORD,
    )  # fmt: skip
    wide = tape.node("StringConcat", blank, words, example=words.example, version=20)
    wide = tape.node("StringConcat", wide, blank, example=words.example, version=20)
    ends = tape.node("Equal", words, tape.constant(np.array(_END)), example=words.example)
    wide = tape.node("Where", ends, nothing, wide, example=words.example)
    letters = tape.node(
        "Tokenizer", wide, example=np.full((EXAMPLES, 1, 1), "", dtype=object), domain="com.microsoft", version=1,
        mark=0, mincharnum=1, pad_value=_PAD, separators=[""],
    )  # fmt: skip
    row = tape.node("Flatten", letters, example=words.example, axis=1)
    return _grams(tape, row, {tuple(gram): index for gram, index in model.vocabulary_.items()})


def _text(tape: Tape, model: Any) -> Value:
    """[N]: the texts as the vectorizer takes them."""
    some = np.full(EXAMPLES, "", dtype=object)
    given = Value(tape, tape.variables[0].full_name, some)
    text = tape.node("Reshape", given, tape.constant([-1], "i"), example=some)
    if model.lowercase:
        text = tape.node("StringNormalizer", text, example=some, case_change_action="LOWER", locale="C.UTF-8")
    return text


def _words_without_stops(tape: Tape, model: Any) -> Expression:
    """How often each n-gram of the vocabulary occurs without the stop words, which move behind all others."""
    expression = token_expression(model)
    if expression is None:
        raise ConversionFailed(
            f"{type(model).__name__} with stop_words, ngram_range={model.ngram_range} and "
            f"token_pattern={model.token_pattern!r} has no ONNX converter. Leave one of them as it is by default."
        )
    text = _text(tape, model)
    text = tape.node("StringConcat", text, tape.constant(np.array(f" {_END}")), example=text.example, version=20)
    words = tape.node(
        "Tokenizer", text, example=text.example[:, None], domain="com.microsoft", version=1, mark=0, mincharnum=1,
        pad_value=_END, tokenexp=f"{expression}|{_END}",
    )  # fmt: skip
    units = {gram: tuple(gram.split(" ")) for gram in model.vocabulary_}
    places = {word: place for place, word in enumerate(sorted({word for unit in units.values() for word in unit}), 1)}
    out = dict.fromkeys([*sorted(model.get_stop_words() or ()), _END], -1)
    known = {**places, **out}
    numbers = tape.node(
        "LabelEncoder", words, example=np.zeros((EXAMPLES, 1), np.int64), domain="ai.onnx.ml", version=2,
        keys_strings=list(known), values_int64s=list(known.values()), default_int64=0,
    )  # fmt: skip
    stops: Expression = np.less(numbers, 0)
    gone = stops.to("i")
    place = tape.node("CumSum", gone * 0 + 1, tape.constant(1, "i"), example=numbers.example)
    width = tape.node("Shape", numbers, example=np.zeros(1, np.int64), start=1, end=2)
    order = tape.nodes(
        "TopK", place + gone * 2**40, width, examples=(numbers.example, numbers.example), axis=1, largest=0, sorted=1
    )[1]
    left = tape.node("GatherElements", numbers, order, example=numbers.example, axis=1)
    grams = {tuple(places[word] for word in units[gram]): index for gram, index in model.vocabulary_.items()}
    return _grams(tape, left, grams)


def _grams(tape: Tape, row: Value, grams: dict[tuple[Any, ...], Any]) -> Expression:
    """[N, grams]: how often each sequence of letters, or of numbers of words, occurs in a row."""
    ordered = sorted(grams.items(), key=lambda item: len(item[0]))
    longest = len(ordered[-1][0])
    starts: list[int] = []
    pool: list[Any] = []
    for length in range(1, longest + 1):
        starts.append(len(pool))
        pool += [unit for gram, _ in ordered if len(gram) == length for unit in gram]
    pools: dict[str, Any] = {"pool_strings" if row.kind == "O" else "pool_int64s": pool}
    return tape.node(
        "TfIdfVectorizer", row, example=np.zeros((EXAMPLES, len(grams)), np.float32), mode="TF", min_gram_length=1,
        max_gram_length=longest, max_skip_count=0, ngram_counts=starts, ngram_indexes=[int(i) for _, i in ordered],
        **pools,
    )  # fmt: skip


def dicts(tape: Tape, model: Any) -> Expression:
    """DictVectorizer: a column of texts gives one for each of its values, a column of numbers stays."""
    columns = {variable.raw_name: tape.value(variable) for variable in tape.variables}
    made: list[Expression] = []
    for name in model.feature_names_:
        key, _, value = name.partition(model.separator)
        if name in columns and columns[name].kind == "f":
            made.append(np.where(np.isnan(columns[name]), 0.0, columns[name]))
        elif key in columns and columns[key].kind != "f":
            column = columns[key]
            equal = tape.node("Equal", column, tape.constant(np.array(value)), example=np.zeros((EXAMPLES, 1), bool))
            made.append(equal.to("f"))
        else:
            raise ConversionFailed(f"DictVectorizer knows {name!r}, and the sample's column is of another type.")
    return tape.concat(made)
