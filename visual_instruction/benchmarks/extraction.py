"""Reading an answer out of a response, by VLMEvalKit's rules for evaluation without a judge ("exact matching").

The rules are those of ``vlmeval/utils/matching_util.py``, ``dataset/utils/yorn.py`` and ``dataset/utils/vqa_eval.py``
at commit e8e78f0 (August 2026), with one exception. There, "answer is" chooses the letter that the next word begins
with ("the answer is blue" chooses B, a rule that came after the paper); here that letter must stand alone. (Z, by
which a judge says that there is no answer, has no meaning in a model's responses.) A response in which no answer is
found counts as wrong, and its share is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# ------------------------------------------------------------------------------------------------------------- options

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LETTERS_AT_END = 4  # a lone letter further from the end of a sentence is an article or a name, not the answer
_ANSWER_IS = re.compile(r"(?i:answer)\s+(?i:is)\s+\**([A-Z])\b")


def read_option(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that a response chooses, or None.

    By the letter: exactly one offered letter stands alone in the response ("B", "(B)", "B. cat", "It is B"), and among
    its last words; else the letter of "answer is B". By the text: exactly one option's text is in the response, which
    is at most twice as long as all options together.

    Args:
        options: letter -> text.
    """
    if any(refusal in response for refusal in _REFUSALS):
        return None
    by_letter = _read_letter(response, options)
    return by_letter if by_letter is not None else _read_text(response, options)


def _read_letter(response: str, options: Mapping[str, str]) -> str | None:
    words = response.translate(_AROUND_LETTERS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LETTERS_AT_END:
        return found[0]
    stated = _ANSWER_IS.search(response)
    return stated[1] if stated and stated[1] in options else None


def _read_text(response: str, options: Mapping[str, str]) -> str | None:
    if len(response) > 2 * sum(len(text) for text in options.values()):
        return None
    found = [letter for letter, text in options.items() if text.lower() in response.lower()]
    return found[0] if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------------------- yes, no


def read_yes_no(response: str) -> str | None:
    """``Yes`` or ``No`` where exactly one of the two words is in the response, in any case; else None."""
    words = set(_without_punctuation(response.lower()).split())
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


# ------------------------------------------------------------------------------------------------------- short answers

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
# Written without one of their apostrophes, these words are restored: "dont" is "don't" (but "its" is not "it's").
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _APOSTROPHES.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def _without_punctuation(text: str) -> str:
    """The official VQA evaluation's treatment of punctuation: removed beside a space, else replaced by one."""
    digits = _DIGIT_COMMA.search(text) is not None
    found = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or digits else " ")
    return _PERIOD.sub("", found)


def normalise(answer: str) -> str:
    """A short answer as VQA's evaluation compares it: without case, punctuation and articles, digits for words."""
    text = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower()
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(response: str, answers: Sequence[str]) -> float:
    """VQA accuracy of a response against the answers of several people (ten in TextVQA).

    The mean, over leaving out one person at a time, of min(1, people among the others who gave this answer / 3). With
    a single answer, 1 if it is the same and 0 if not.
    """
    given, wanted = normalise(response), [normalise(answer) for answer in answers]
    if len(wanted) == 1:
        return float(given == wanted[0])
    same = sum(answer == given for answer in wanted)
    return sum(min(1.0, (same - (answer == given)) / 3) for answer in wanted) / len(wanted)
