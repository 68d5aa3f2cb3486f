"""
Small word problems, worksheets, and the tokenizer for both: all the text of the demonstration, made from a seed.

A problem is a story of two or three steps, and its solution writes each step as an equation:

    Mia has 23 marbles. She buys 18 more marbles. Then she gives 9 marbles to Ben. How many marbles does Mia have now?
    Mia starts with 23 marbles. Buying 18 makes 23 + 18 = 41. Giving away 9 makes 41 - 9 = 32. Answer: 32

A worksheet is equations alone, each behind words and numbers that have nothing to do with it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SMALLEST, LARGEST = 5, 60  # of the numbers in a story
LARGEST_RESULT = 99

NAMES = ("Mia", "Ben", "Zoe", "Tom", "Ada", "Sam", "Lily", "Max", "Nina", "Leo", "Eva", "Jack")
ITEMS = ("marbles", "apples", "stamps", "cards", "shells", "coins", "stickers", "books", "pears", "beads")
# (in the story, in the solution): N is the number, ITEM the things, OTHER somebody else, NAME who the story is about.
GAINS = (
    ("NAME buys N more ITEM.", "Buying N makes"),
    ("Then NAME finds N ITEM in the garden.", "Finding N makes"),
    ("OTHER gives NAME N ITEM.", "Getting N makes"),
    ("After school NAME wins N ITEM.", "Winning N makes"),
    ("NAME gets N ITEM for a birthday.", "Getting N makes"),
)
LOSSES = (
    ("NAME gives N ITEM to OTHER.", "Giving away N makes"),
    ("Then NAME loses N ITEM on the way home.", "Losing N makes"),
    ("NAME sells N ITEM at the market.", "Selling N makes"),
    ("OTHER borrows N of the ITEM.", "Lending N makes"),
    ("After that NAME throws away N old ITEM.", "Throwing away N makes"),
)
STARTS = (
    ("NAME has N ITEM.", "NAME starts with N ITEM."),
    ("There are N ITEM in the box of NAME.", "The box holds N ITEM."),
    ("In the morning NAME counts N ITEM.", "At first there are N ITEM."),
)
QUESTIONS = ("How many ITEM does NAME have now?", "How many ITEM are left in the end?", "How many ITEM is that?")
TEMPLATES = [part for pair in (*STARTS, *GAINS, *LOSSES) for part in pair] + [*QUESTIONS, "Answer"]
PLACES = ("N", "ITEM", "NAME", "OTHER")
WORDS = [w for w in dict.fromkeys(re.findall(r"[A-Za-z]+", " ".join([*TEMPLATES, *NAMES, *ITEMS]))) if w not in PLACES]


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        prompt (`str`): The story and its question, with the newline that ends them.
        solution (`str`): What a perfect writer answers.
        answer (`int`): The number after "Answer:".
    """

    prompt: str
    solution: str
    answer: int

    def is_solved_by(self, text: str) -> bool:
        """Whether the text ends as asked, with `Answer: N`, and N is right."""
        found = re.search(r"Answer: (\d+)\s*$", text)
        return found is not None and int(found.group(1)) == self.answer


def make_problem(rng: random.Random, knows_arithmetic: bool = True) -> Problem:
    """
    One problem of two or three steps. Without arithmetic each result is a random number, used consistently from there
    on: such text teaches language and format, and nothing about sums.
    """
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)

    def fill(template: str, number: int = 0) -> str:
        text = re.sub(r"\bN\b", str(number), template).replace("ITEM", item)
        return text.replace("NAME", name).replace("OTHER", other)

    total = rng.randint(SMALLEST, LARGEST)
    start = rng.choice(STARTS)
    story, solution = [fill(start[0], total)], [fill(start[1], total)]
    for _ in range(rng.choice((2, 3))):
        left, sign, right, result = make_equation(rng, total)
        said, written = rng.choice(GAINS if sign == "+" else LOSSES)
        total = result if knows_arithmetic else rng.randint(0, LARGEST_RESULT)
        story.append(fill(said, right))
        solution.append(f"{fill(written, right)} {left} {sign} {right} = {total}.")
    story.append(fill(rng.choice(QUESTIONS)))
    return Problem(" ".join(story) + "\n", " ".join(solution) + f" Answer: {total}", total)


def make_equation(rng: random.Random, left: int) -> tuple[int, str, int, int]:
    """An equation `left sign right = result` with `right` a number of a story and a result from 0 to 99."""
    signs = [sign for sign, fits in (("+", left + SMALLEST <= LARGEST_RESULT), ("-", left >= SMALLEST)) if fits]
    sign = rng.choice(signs)
    right = rng.randint(SMALLEST, min(LARGEST, LARGEST_RESULT - left if sign == "+" else left))
    return left, sign, right, left + right if sign == "+" else left - right


def make_worksheet(rng: random.Random, equations: int = 8) -> str:
    """
    Equations about nothing, behind words, numbers and signs in no order, so that no token is new to its reader:
    ` Mia buys? 23 makes 71 - 12 = 59. box 7\nLeo 4 + 9 = 13. ...`
    """
    text = ""
    for _ in range(equations):
        for _ in range(rng.randint(0, 8)):
            before = rng.choices((" ", "? ", ": ", "\n"), (27, 1, 1, 1))[0]
            is_word = before == "\n" or rng.random() < 0.8
            text += before + (rng.choice(WORDS) if is_word else str(rng.randint(0, LARGEST_RESULT)))
        left, sign, right, result = make_equation(rng, rng.randint(0, LARGEST_RESULT))
        text += f" {left} {sign} {right} = {result}."
    return text


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a word, a sign or a whole number from 0 to 99, with the space before it; text comes back unchanged."""
    words = [*WORDS, *(str(number) for number in range(LARGEST_RESULT + 1)), "+", "-", "="]
    pieces = ["<pad>", "<end>", "<unknown>", "\n", ".", "?", ":"]
    pieces += [start + word for word in words for start in ("", " ")]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d+| ?[-+=]|[\n.?:]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
