"""Ours: bytes for each token against accuracy, of lossless decoding beside lossy Caprese.

The pass of the full model that a reselection makes verifies what the sparse model has drafted, so
the answers are the full model's (sample.stream_verified). What L and R are worth is then how many
drafted tokens stand. n is the number of tokens of a pass; without it the decoding is lossy, without
reselection. Bytes are those of the weights. Each answer is greedy and decoded alone.
"""

import time
from collections import Counter

from paper import common

import torch

import caprese
import data
import sample
from paper.experiment import BOTH_STAGES

NEEDS = ("graded",)
QUICK = {"limit": 40}
FULL = {"limit": 200}
PASSES = (2, 4, 8, 16)


def answer_all(experiment, problems, n, counts):
    """The tokens of all answers by the attached model, and the seconds they took."""
    model, tokenizer = experiment.model, experiment.tokenizer
    answers, start = [], time.perf_counter()
    for problem in problems:
        prompt = torch.tensor([tokenizer.prompt_ids(data.ask(problem))], device=model.device)
        new = sample.generate(model, prompt, experiment.args.max_new_tokens, reselect=n,
                              stop_ids=tokenizer.stop_ids, verify=n is not None, counts=counts)
        answers.append(new[0].tolist())
    return answers, time.perf_counter() - start


def measure(experiment):
    """A row for each variant and each n."""
    rows, expected = [], None
    _, problems = experiment.graded()
    methods = ("griffin", "griffin-all")
    for variant in experiment.variants(methods, stages=(BOTH_STAGES,)):
        model = experiment.prepare(variant)
        full, active = caprese.weights_read(model)
        for n in (None,) if variant.name == "full" else (None, *PASSES):
            counts = Counter()
            answer_all(experiment, problems[:1], n, Counter())  # warms up
            answers, seconds = answer_all(experiment, problems, n, counts)
            expected = expected or answers  # the full model answers first
            texts = [experiment.tokenizer.decode(ids) for ids in answers]
            right = sum(data.correct(text, p.answer) for text, p in zip(texts, problems))
            equal = sum(one == other for one, other in zip(answers, expected))
            ratios = sample.acceptance(model, counts) or {
                "acceptance": None, "tokens_per_pass": None,
                "bytes_to_full": active / full}
            rows.append({"method": variant.name, "n": n, "accuracy %": 100 * right / len(problems),
                         "equal %": 100 * equal / len(problems), **ratios,
                         "ms per token": 1e3 * seconds / sum(map(len, answers))})
    return rows


def draw(figure, rows):
    """Accuracy against bytes: lossy answers are dots, verified ones crosses, a cross for each n."""
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        everywhere = " all layers" in method
        style = {"color": common.color(method.replace(" all layers", "")), "linestyle": "none",
                 "fillstyle": "none" if everywhere else "full"}
        for marker, verified in (("o", False), ("+" if everywhere else "x", True)):
            chosen = [row for row in rows
                      if row["method"] == method and (row["n"] is not None) == verified]
            axes.plot([row["bytes_to_full"] for row in chosen],
                      [row["accuracy %"] for row in chosen], marker=marker,
                      label=f"{method}, verified" if verified else method, **style)
    axes.axhline(rows[0]["accuracy %"], color="black", linestyle="--", label="full")
    axes.set(xlabel="bytes for each token, full model = 1", ylabel="accuracy %")


if __name__ == "__main__":
    common.main("lossless")
