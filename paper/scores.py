"""From text to numbers: what an answer earns, what many earn together, and how sure that is."""

import math
import re
import statistics
from collections import Counter

import sample

try:
    from paper.grading import correct, final_answer  # they know LaTeX, units, letters, prose
except ImportError:
    from data import correct, final_answer

SCORES = ("accuracy", "contains", "f1", "rouge1", "rouge2", "rougeL")


# ---- one answer

def right_or_wrong(problem):
    """Is an answer to this problem right or wrong? To a passage or an article it has scores."""
    return problem.kind not in ("passage", "summary")


def scores(problem, response):
    """{score: value in [0, 1]} of a response, which ones by the problem's kind."""
    if problem.kind == "summary":
        return rouge(response.split("###")[0], problem.answer)  # a base model writes the next one
    if problem.kind == "passage":
        return {"contains": float(contains(response, problem.answer)),
                "f1": f1(final_answer(response) or response, problem.answer)}
    return {"accuracy": float(correct(response, problem.answer))}


def words(text):
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"\w+", text.lower())


def content_words(text):
    """The words of a text without articles, as SQuAD compares them."""
    return [word for word in words(text) if word not in ("a", "an", "the")]


def contains(text, reference):
    """Do the words of the reference stand side by side in a text? Articles do not count."""
    reference_words, text_words = (" ".join(content_words(t)) for t in (reference, text))
    return f" {reference_words} " in f" {text_words} "


def f_measure(a, b):
    """Twice what two Counters share, over the size of both."""
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 0.0


def f1(text, reference):
    """SQuAD's F1 in [0, 1]: the words that an answer and its reference share, without articles."""
    return f_measure(Counter(content_words(text)), Counter(content_words(reference)))


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


# ---- many answers

def standard_error(values):
    """The standard error of the mean of values in [0, 1], one for each problem.

    Of zeros and ones it is sample.standard_error, Wilson's, which is never 0.
    """
    if set(values) <= {0, 1}:
        return sample.standard_error(statistics.fmean(values), len(values))
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.5


def mean_of_runs(answers, score):
    """[a score of each problem], the mean of its runs; problems in order of their first answer."""
    of_problem = {}
    for answer in answers:
        of_problem.setdefault(answer["problem"], []).append(answer[score])
    return [statistics.fmean(values) for values in of_problem.values()]


def summary(answers, prefix=""):
    """Columns of a table: each score in percent with its standard error, mean response tokens."""
    columns = {}
    for score in SCORES:
        if score in answers[0]:
            values = mean_of_runs(answers, score)
            columns |= {f"{prefix}{score} %": 100 * statistics.fmean(values),
                        f"{prefix}{score} ±": 100 * standard_error(values)}
    return columns | {f"{prefix}tokens": statistics.fmean(answer["tokens"] for answer in answers)}


def differences(answers, others, prefix=""):
    """Columns of a table: how many points each score lies above that of others to these problems.

    The standard error is that of the mean of the differences, problem by problem. Of answers that
    are right or wrong it is at least Wilson's of no difference at all, so never 0.
    """
    columns = {}
    for score in SCORES:
        if score in answers[0]:
            pairs = zip(mean_of_runs(answers, score), mean_of_runs(others, score), strict=True)
            values = [value - other for value, other in pairs]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.5
            if set(values) <= {-1, 0, 1}:
                error = max(error, sample.standard_error(0.0, len(values)))
            column = f"{prefix}{score}, difference, points"
            columns |= {column: 100 * statistics.fmean(values), f"{column} ±": 100 * error}
    return columns


def ratio(numerators, denominators):
    """(sum of one / sum of the other, its standard error), from one pair for each answer.

    (None, None) where the denominators are all 0. The answers are the repeats of a measured time.
    """
    n, total = len(numerators), sum(denominators)
    if total == 0:
        return None, None
    value = sum(numerators) / total
    squares = sum((a - value * b) ** 2 for a, b in zip(numerators, denominators))
    return value, math.sqrt(squares * n / max(1, n - 1)) / total


def timing(seconds, tokens, right):
    """Columns of a table from the seconds, the tokens and the verdict of each answer.

    The seconds contain prefill and reselections. Those to a right answer are all seconds over the
    number of right answers: what a user waits for, if answers are long or wrong.
    """
    times = {"ms per token": ([1e3 * s for s in seconds], tokens),
             "seconds": (seconds, [1] * len(seconds)),
             "seconds to a right answer": (seconds, right)}
    columns = {}
    for name, (numerators, denominators) in times.items():
        columns[name], columns[f"{name} ±"] = ratio(numerators, denominators)
    return columns
