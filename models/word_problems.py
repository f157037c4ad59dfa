"""Write easy word problems with worked solutions: python models/word_problems.py --out FILE

What models/finetune.py takes beside GSM8K: problems of one to three steps in everyday words, the
running-number problems of data.py, and with --reading questions on its passages, in the words of a
chat. With --held-out the file holds only the latter two, as evaluation problems, which no training
file of this script contains; data.py trains on none of the running-number problems either.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import sample  # noqa: E402

NAMES = data.NAMES + "Olivia Haley Paul Nancy Robin Wendy Henry Gwen Kaleb Faye".split()
THINGS = data.THINGS + ("flowers balloons tickets pictures eggs muffins toys oranges songs games "
                        "bottles cups chairs").split()
PLACES = "boxes bags baskets shelves rows groups jars tables albums teams".split()
LOSSES = ["gave {n} to {other}", "lost {n} of them", "sold {n}", "threw {n} away", "broke {n}",
          "used {n} of them", "took {n} back", "left {n} at home", "traded {n} for a hat"]
GAINS = ["bought {n} more", "found {n} more", "won {n} more", "got {n} more from {other}",
         "made {n} more", "collected {n} more", "added {n} more", "received {n} more as a gift"]
# A story with its question, then the steps: what is said, and what is computed from a, b, c, ...
# and from the results x and y of the steps before. {gain_b} is one of GAINS with the number b.
STORIES = [
    ("{who} had {a} {things}. {who} {loss_b} and later {gain_e}. How many {things} does {who} have "
     "now?", ("After the first change {who} had", "a - b"), ("Now {who} has", "x + e")),
    ("{who} had {a} {things}. First {who} {gain_b}, then {who} {loss_e}. How many does {who} have?",
     ("{who} had at first", "a + b"), ("Then {who} had", "x - e")),
    ("If {who} had {a} {things} and {gain_b}, and after that {gain_e}, how many {things} would "
     "{who} have in all?", ("First {who} would have", "a + b"), ("In all that is", "x + e")),
    ("{who} started with {a} {things}. {who} {loss_b} in the morning and {loss_e} in the evening. "
     "How many {things} are left?", ("In the morning there were", "a - b"), ("Left are", "x - e")),
    ("{who} had to sort {a} red {things} and {b} blue {things}, but sorted only {e} of them. How "
     "many did {who} not sort?", ("There were", "a + b"), ("Not sorted were", "x - e")),
    ("{who} found {a} {things} and {other} found {b}. Only {e} of all these were good. How many "
     "were bad?", ("Together they found", "a + b"), ("The bad ones were", "x - e")),
    ("{a} girls and {b} boys came to a game, and {e} of them could play. How many had to watch?",
     ("All who came were", "a + b"), ("Those who watched were", "x - e")),
    ("{who} bought {c} packs of red {things} and {d} packs of green {things}. Each pack holds {f} "
     "{things}. How many {things} did {who} buy?", ("The packs were", "c + d"),
     ("The {things} were", "x * f")),
    ("In a room are {c} old tables and {d} new ones, with {f} {things} on each table. How many "
     "{things} are in the room?", ("The tables are", "c + d"), ("The {things} are", "x * f")),
    ("{c} players were in a game when {d} more joined. Each player has {f} {things}. How many "
     "{things} do they have together?", ("The players were", "c + d"), ("Together", "x * f")),
    ("{who} had {f} {places} of {things}, {c} in each. {who} {loss_d}. How many {things} remain?",
     ("At first there were", "f * c"), ("What remains is", "x - d")),
    ("{who} earned ${c} for each of {f} jobs, but did only {d} of the jobs. How much did {who} "
     "earn?", ("{who} earned", "c * d")),
    ("{who} has to carry {a} {things} and {b} cards. One trip takes {c} pieces. How many trips are "
     "needed?", ("The pieces are", "a + b"), ("The trips are", "x / c")),
    ("Of {a} {things} {who} {loss_b}. {who} put the rest into {places} of {c}. How many {places} "
     "are there?", ("The rest was", "a - b"), ("That fills", "x / c")),
    ("{who} saved ${a} and got ${b} as a gift. How many {things} at ${c} each can {who} buy?",
     ("{who} has", "a + b"), ("{who} can buy", "x / c")),
    ("A book has {c} chapters of {f} pages. {who} has read {d} pages. How many pages are left?",
     ("The book has", "c * f"), ("Left are", "x - d")),
    ("{who} is {a} years old and {other} is {b} years younger. How old will {other} be in {d} "
     "years?", ("{other} is", "a - b"), ("Then {other} will be", "x + d")),
    ("One {thing} weighs {c} grams and one card {d} grams. {who} has {f} of each. How many grams "
     "is that?", ("One of each weighs", "c + d"), ("All weigh", "x * f")),
    ("{who} and {other} had {a} {things} together. {who} had {b} of them. {other} then {gain_e}. "
     "How many does {other} have?", ("{other} had", "a - b"), ("Now {other} has", "x + e")),
    ("A shop had {a} {things}. It sold {b}, and then {e} new ones arrived. How many {things} are "
     "in the shop?", ("After the sale there were", "a - b"), ("Now there are", "x + e")),
    ("A train had {a} people. At a stop {b} got off and {e} got on. How many are on the train?",
     ("When they got off there were", "a - b"), ("Now there are", "x + e")),
    ("{who} had {a} {things}. Later {who} got {b} more. How many {things} does {who} have now?",
     ("{who} now has", "a + b")),
    ("There were {a} {things} in the room. {who} took {b} of them away. How many are left?",
     ("The number left is", "a - b")),
    ("{who} has {a} {things} and {other} has {b}. How many more {things} does {who} have than "
     "{other}?", ("The difference is", "a - b")),
    ("{who} packs {c} {things} into each of {b} {places}. How many {things} is that in all?",
     ("In all that is", "b * c")),
    ("{who} put {a} {things} into {c} equal {places}. How many {things} are in each?",
     ("Each holds", "a / c")),
    ("A {thing} costs ${c}. {who} has ${a}. How many can {who} buy?",
     ("{who} can buy", "a / c")),
    ("{who} had {a} {things} and bought {b} more. Then {who} gave {c} to {other}. How many "
     "{things} does {who} have left?",
     ("Before giving any away {who} had", "a + b"), ("That leaves", "x - c")),
    ("At a fair {who} won {a} {things}. {who} lost {b} of them and shared the rest equally into "
     "{c} {places}. How many {things} went into each?",
     ("After the loss {who} had", "a - b"), ("Each got", "x / c")),
    ("{who} has {a} {things} and {other} has {b}. They put them together into {places} of {c} "
     "each. How many {places} do they fill?",
     ("Together they have", "a + b"), ("They fill", "x / c")),
    ("{who} bought {c} {things} for ${b} each and paid with ${a}. How much change did {who} get?",
     ("The price was", "c * b"), ("The change was", "a - x")),
    ("{who} earns ${b} an hour and works {c} hours. {who} already had ${a}. How much money does "
     "{who} have now?", ("{who} earned", "b * c"), ("In all {who} has", "a + x")),
    ("There are {c} {places} with {a} {things} each and {d} {places} with {b} {things} each. How "
     "many {things} are there?", ("The first hold", "c * a"), ("The others hold", "d * b"),
     ("Together there are", "x + y")),
    ("{who} bought {a} {things} and {other} bought {b}. {d} of them were broken. How many good "
     "{things} do they have?", ("They bought", "a + b"), ("The good ones are", "x - d")),
    ("{who} had ${a}. {who} spent ${b} on lunch and bought {things} with the rest, at ${c} each. "
     "How many {things} did {who} buy?",
     ("After lunch {who} had", "a - b"), ("{who} bought", "x / c")),
    ("A teacher invited {a} pupils, but {b} of them stayed at home. Each of the others got {c} "
     "{things}. How many {things} were needed?",
     ("The pupils who came were", "a - b"), ("They needed", "x * c")),
    ("{who} made {a} {things} for a sale and sold {b} of them. The rest were sold the next day at "
     "${c} each. How much money did the next day bring?",
     ("The rest were", "a - b"), ("They brought", "x * c")),
    ("{who} collected {a} {things} on Monday, {b} on Tuesday and {d} on Wednesday. How many "
     "{things} is that altogether?",
     ("In the first two days that is", "a + b"), ("Altogether it is", "x + d")),
    ("Each ride takes {c} tickets. {who} bought {a} tickets and has {b} left from last year. How "
     "many rides can {who} take?", ("{who} has", "a + b"), ("{who} can take", "x / c")),
    ("{who} read {c} pages a day for {d} days. The book has {a} pages. How many pages are left?",
     ("{who} has read", "c * d"), ("The pages left are", "a - x")),
    ("{who} has {c} times as many {things} as {other}. {other} has {b}. How many do they have "
     "together?", ("{who} has", "c * b"), ("Together they have", "x + b")),
    ("There are {a} {things} on {c} equal {places}. {who} takes all that is on {d} of them. How "
     "many {things} does {who} take?", ("Each holds", "a / c"), ("{who} takes", "x * d")),
    ("{who} needs {a} {things} for a party. {who} has {b}, and the shop sells them in packs of "
     "{c}. How many packs must {who} buy?",
     ("{who} still needs", "a - b"), ("The packs are", "x / c")),
]


def compute(expression, values):
    """The value of "a + b" by the names in values; None if it is not a whole number above 0."""
    left, op, right = expression.split()
    a, b = values[left], values[right]
    if op == "/":
        return a // b if a % b == 0 else None
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return result if result > 0 else None


def make_story(rng):
    """One problem of STORIES, with numbers for which every step gives a whole number above 0."""
    story, *steps = rng.choice(STORIES)
    who, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    words = {"who": who, "other": other, "things": things, "thing": things[:-1],
             "places": rng.choice(PLACES)}
    while True:
        largest = rng.choice((20, 50, 99))
        values = {name: rng.randint(2, largest) for name in "abe"}
        values |= {name: rng.randint(2, 10) for name in "cdf"}
        numbers = dict(values)
        lines = []
        for (said, expression), name in zip(steps, "xyz"):
            result = compute(expression, numbers)
            if result is None:
                break
            numbers[name] = result
            left, op, right = expression.split()
            lines.append(f"{said.format(**words)} {numbers[left]} {op} {numbers[right]} = "
                         f"{result}.")
        if len(lines) == len(steps):
            for name, n in values.items():
                words[f"gain_{name}"] = rng.choice(GAINS).format(n=n, other=other)
                words[f"loss_{name}"] = rng.choice(LOSSES).format(n=n, other=other)
            return {"question": story.format(**words, **values),
                    "answer": "\n".join(lines) + f"\n#### {result}"}


def make_reading(count, seed, held_out):
    """`count` different questions on passages of 14 to 16 facts, as one asks a chat model."""
    rng, rows = random.Random(f"reading {seed}"), {}
    while len(rows) < count:
        passage, questions = data.make_passage(rng, rng.randint(5, 8), rng.randint(14, 16))
        asked, response, answer = rng.choice(questions)
        text = f"Text: {passage}\n\nQuestion: {asked}\n\nAnswer the question in one short sentence."
        if data.held_out(text) == held_out:
            rows[text] = {"question": text, "answer": answer, "kind": "passage",
                          "response": response.partition(" ####")[0]}
    return list(rows.values())


def make_rows(args):
    """The rows of the file, in random order."""
    rows = []
    for problem in data.problems("maths", args.running, args.seed, evaluation=args.held_out):
        rows.append({"question": problem.question, "answer": problem.response,
                     "level": problem.level})
    rows += make_reading(args.reading, args.seed, args.held_out)
    if args.held_out:
        return rows
    rng, stories = random.Random(f"stories {args.seed}"), {}
    while len(stories) < args.stories:
        row = make_story(rng)
        stories[row["question"]] = row
    rows += stories.values()
    rng.shuffle(rows)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", required=True, help="JSONL file to write")
    add("--stories", type=int, default=4000, help="everyday problems (default: %(default)s)")
    add("--running", type=int, default=1500, help="data.py's (default: %(default)s)")
    add("--reading", type=int, default=0, help="questions on passages (default: %(default)s)")
    add("--held-out", action="store_true", help="evaluation problems alone")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    with open(f"{args.out}.tmp", "w", encoding="utf-8") as file:
        for row in make_rows(args):
            file.write(json.dumps(row) + "\n")
    os.replace(f"{args.out}.tmp", args.out)


if __name__ == "__main__":
    sample.run_command(main)
