"""A concept in a prompt: the prompt without it.

A query for a concept is a difference, that of two gradients on one picture and with one noise: with the prompt, and
with the prompt without the concept. The idea is Concept-TRAK's (arXiv 2507.06547).
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from dmin_trace.errors import QueryError, brief
from dmin_trace.query.inputs import QueryInput, each_of

OPENING, CLOSING, SEPARATORS = "([{", ")]}", ",;:"


def prompt_without(prompt: str, concept: str) -> str:
    """The prompt without every occurrence of a concept, whole words in any case, and without what separated it.

    Raises QueryError if the concept has no words, or the prompt does not have them.
    """
    words = concept.split()
    if not words:
        raise QueryError("The concept has no words. Give the words that are to be taken out of the prompt.")
    # A hyphen or an apostrophe inside a word is a part of it.
    pattern = re.compile(
        r"(?<![\w-])(?<!\w['’])" + r"\s+".join(map(re.escape, words)) + r"(?![\w-])(?!['’]\w)", re.IGNORECASE
    )
    left = prompt
    if not pattern.search(left):
        raise QueryError(
            f"The prompt {brief(prompt)} does not have the concept {brief(concept)} as whole words. Give words of it, "
            "or the whole prompt without the concept (--without)."
        )
    while found := pattern.search(left):
        left = _join(left[: found.start()].rstrip(), left[found.end() :].lstrip())
    return left


def _join(before: str, after: str) -> str:
    """What stood before a concept and after it, with one separator between them at most."""
    while before[-1:] and before[-1] in OPENING and after[:1] == CLOSING[OPENING.index(before[-1])]:
        before, after = before[:-1].rstrip(), after[1:].lstrip()
    opened = before[-1:] in (*OPENING, "")
    if after[:1] in (*SEPARATORS,) and (opened or before[-1] in SEPARATORS):
        after = after[1:].lstrip()
    if after[:1] in (*CLOSING, *".!?", ""):
        before = before.rstrip(SEPARATORS + " ")
    opened = before[-1:] in (*OPENING, "")
    close = opened or after[:1] in (*SEPARATORS, *CLOSING, *".!?", "")
    return before + ("" if close else " ") + after


def with_concepts(inputs: Sequence[QueryInput], concepts: Sequence[str], without: Sequence[str]) -> list[QueryInput]:
    """The inputs as queries for a concept, if any is given: the words of it, or the whole prompt without it.

    Of both there is one for each input in order, or one for all. Raises QueryError if both are given, an input has no
    prompt, or a prompt does not have its concept.
    """
    if concepts and without:
        raise QueryError("--concept and --without were given. Give the words of the concept, or the prompt without it.")
    if not concepts and not without:
        return list(inputs)
    if missing := next((one for one in inputs if one.prompt is None), None):
        raise QueryError(f"A concept was given, but {missing.image} has no prompt. Give its prompt with --prompt.")
    texts = each_of(concepts or without, len(inputs), "concepts" if concepts else "prompts without a concept")
    return [
        replace(one, without=prompt_without(one.prompt or "", text) if concepts else text)
        for one, text in zip(inputs, texts, strict=True)
    ]
