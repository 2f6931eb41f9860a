"""Vectorizers of texts, where skl2onnx has no way: letters within words, and logarithms of counts."""

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
    """CountVectorizer(analyzer="char_wb")."""
    number = _letters_within_words(tape, model)
    return (number > 0).to("f") if model.binary else number


def tf_idf(tape: Tape, model: Any) -> Expression:
    """TfidfVectorizer with char_wb or sublinear_tf: the counts, and what scikit-learn does to them."""
    from sklearn.feature_extraction.text import CountVectorizer

    if model.analyzer == "char_wb":
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


def needs_letters(model: Any) -> bool:
    return bool(model.analyzer == "char_wb")


def needs_letters_or_logarithms(model: Any) -> bool:
    return bool(model.analyzer == "char_wb" or model.sublinear_tf)


def _letters_within_words(tape: Tape, model: Any) -> Expression:
    """How often each n-gram of the vocabulary occurs: [N, vocabulary].

    The letters of all words of a text in one row, each word between blanks. Two blanks meet only where words do, and
    no n-gram of the vocabulary has them, so none is counted across words.
    """
    if model.strip_accents is not None or model.preprocessor is not None:
        raise ConversionFailed(
            f"{type(model).__name__} with strip_accents or a preprocessor has no ONNX converter. Prepare the texts "
            "before the pipeline."
        )
    name = tape.variables[0].full_name
    some = np.full(EXAMPLES, "", dtype=object)
    text = tape.node("Reshape", Value(tape, name, some), tape.constant([-1], "i"), example=some)
    if model.lowercase:
        text = tape.node("StringNormalizer", text, example=some, case_change_action="LOWER", locale="C.UTF-8")
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
    grams = sorted(model.vocabulary_.items(), key=lambda item: len(item[0]))
    longest = len(grams[-1][0])
    starts: list[int] = []
    pool: list[str] = []
    for length in range(1, longest + 1):
        starts.append(len(pool))
        for gram, _ in grams:
            if len(gram) == length:
                pool += list(gram)
    size = len(model.vocabulary_)
    return tape.node(
        "TfIdfVectorizer", row, example=np.zeros((EXAMPLES, size), np.float32), mode="TF", min_gram_length=1,
        max_gram_length=longest, max_skip_count=0, ngram_counts=starts, pool_strings=pool,
        ngram_indexes=[int(index) for _, index in grams],
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
