"""From text to numbers: what an answer earns, and what many earn together."""

import math
import random
import re
import statistics
from collections import Counter

import data

SCORES = ("accuracy", "f1", "rouge1", "rouge2", "rougeL")


def read_row(row):
    """data.problem_from_row, and GPQA's own columns: its options in an order that the question
    decides."""
    if "Correct Answer" not in row:
        return data.problem_from_row(row)
    options = [row["Correct Answer"]] + [row[f"Incorrect Answer {i}"] for i in (1, 2, 3)]
    random.Random(row["Question"]).shuffle(options)
    return data.problem_from_row({"question": row["Question"], "options": options,
                                  "answer": options.index(row["Correct Answer"])})


def scores(problem, response):
    """{score: value in [0, 1]} of a response: accuracy, F1 or ROUGE by the problem's kind."""
    if problem.kind == "summary":
        return rouge(response.split("###")[0], problem.answer)  # a base model writes the next one
    if problem.kind == "passage":
        return {"f1": f1(data.final_answer(response) or response, problem.answer)}
    return {"accuracy": float(data.correct(response, problem.answer))}


def words(text):
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"\w+", text.lower())


def f_measure(a, b):
    """Twice what two Counters share, over the size of both."""
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 0.0


def f1(text, reference):
    """SQuAD's F1 in [0, 1]: the words that an answer and its reference share, without articles."""
    articles = {"a", "an", "the"}
    counts = [Counter(w for w in words(t) if w not in articles) for t in (text, reference)]
    return f_measure(*counts)


def rouge(text, reference):
    """ROUGE-1, -2 and -L in [0, 1]: F-measures of words, word pairs, and longest common
    subsequence."""
    a, b = words(text), words(reference)
    longest = [0] * (len(b) + 1)  # [j]: common subsequence of the words of a so far and of b[:j]
    for word in a:
        previous, longest = longest, [0]
        for j, other in enumerate(b):
            skip = max(previous[j + 1], longest[j])
            longest.append(previous[j] + 1 if word == other else skip)
    return {"rouge1": f_measure(Counter(a), Counter(b)),
            "rouge2": f_measure(Counter(zip(a, a[1:])), Counter(zip(b, b[1:]))),
            "rougeL": 2 * longest[-1] / (len(a) + len(b)) if a or b else 0.0}


def summary(answers, prefix=""):
    """Columns of a table: each score in percent, its standard deviation, mean response tokens.

    The deviation is that of the runs' means if there are several runs, else that of the mean.
    """
    runs = {}
    for answer in answers:
        runs.setdefault(answer["run"], []).append(answer)
    columns = {}
    for score in SCORES:
        if score in answers[0]:
            values = [100 * answer[score] for answer in answers]
            means = [statistics.fmean(100 * a[score] for a in run) for run in runs.values()]
            alone = statistics.pstdev(values) / math.sqrt(len(values))
            columns[f"{prefix}{score} %"] = statistics.fmean(values)
            columns[f"{prefix}{score} ±"] = statistics.stdev(means) if len(means) > 1 else alone
    tokens = statistics.fmean(answer["tokens"] for answer in answers)
    return columns | {f"{prefix}tokens": tokens}
