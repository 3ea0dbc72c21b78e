"""What an answer is worth next to the wanted one, from 0 to 1: pure functions of two texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from mlxft.objectives.onpolicy.rules import last_number

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(said: str, wanted: str, ignore_case: bool = False) -> float:
    """1 if the two are the same, white space around them aside."""
    if ignore_case:
        said, wanted = said.casefold(), wanted.casefold()
    return float(said.strip() == wanted.strip())


def contains(said: str, wanted: str, ignore_case: bool = False) -> float:
    """1 if the wanted text stands somewhere in what was said; an empty one only in nothing."""
    if ignore_case:
        said, wanted = said.casefold(), wanted.casefold()
    return float(wanted.strip() in said if wanted.strip() else not said.strip())


def number(said: str, wanted: str, tolerance: float = 1e-6, pattern: str | None = None) -> float:
    """1 if the last number said is the (last) wanted one; commas, currency and percent signs do not count.

    Args:
        tolerance: largest difference between the two.
        pattern: where to look: the last match of this regular expression, or of its first group.
    """
    if pattern is not None:
        every = list(re.finditer(pattern, said))
        said = (every[-1].group(1 if every[-1].re.groups else 0) or "") if every else ""
    one, two = last_number(said), last_number(wanted)
    return float(one is not None and two is not None and abs(one - two) <= tolerance)


def regex(said: str, pattern: str) -> float:
    """1 if the regular expression is found."""
    return float(re.search(pattern, said) is not None)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD 1.1 normalises answers (Rajpurkar et al. 2016)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(said: str, wanted: str) -> float:
    """F1 of the words that the two have in common, each as often as it stands in both: SQuAD's."""
    one, two = words(said), words(wanted)
    common = sum((Counter(one) & Counter(two)).values())
    if not one or not two:  # SQuAD 2.0: nothing is right where nothing was wanted
        return float(one == two)
    return 2 * common / (len(one) + len(two))


def best(score: Callable[[str, str], float], said: str, wanted: tuple[str, ...]) -> float:
    """The score of the wanted text that suits best, where several are right."""
    return max(score(said, text) for text in wanted)
