"""Ours: bytes for each token against accuracy, of lossless decoding beside lossy Caprese.

The pass of the full model that a reselection makes verifies what the sparse model has drafted, so
the answers are the full model's (beyond/lossless.py). What L and R are worth is then how many
drafted tokens stand. n is the number of tokens of a pass; without it the decoding is lossy, without
reselection. Bytes are those of the weights. Each answer is greedy and decoded alone.
"""

import statistics
from collections import Counter

import bench
import sample
from paper import common, report
from paper.experiment import Experiment
from paper.scores import correct, ratio, standard_error

PASSES = (2, 4, 8, 16)


def main(argv=None):
    """A row for each variant and each n."""
    args = common.arguments("paper.lossless", __doc__, argv, limit=(40, 200))
    try:
        from beyond import lossless
    except ImportError as error:
        raise common.CannotRun(f"this measures beyond/lossless.py ({error})") from None
    experiment = Experiment(args)
    name, problems = experiment.graded()
    rows, expected = [], None
    for variant in common.variants(args, ("griffin", "griffin-all"), each_stage=False):
        model = experiment.prepare(variant)
        full, active = bench.weights_read(model)
        for n in (None,) if variant.name == "full" else (None, *PASSES):
            counts = Counter()

            def generate(prompt):
                settings = {"stop_ids": experiment.tokenizer.stop_ids}
                if n is None:
                    return sample.generate(model, prompt, args.max_new_tokens, **settings)
                return lossless.generate(model, prompt, args.max_new_tokens, n, counts=counts,
                                         **settings)

            answers, texts, seconds = experiment.answer_alone(problems, generate)
            expected = expected or answers  # the full model answers first
            right = [float(correct(text, p.answer)) for text, p in zip(texts, problems)]
            equal = [float(one == other) for one, other in zip(answers, expected)]
            ms, error = ratio([1e3 * s for s in seconds], [len(ids) for ids in answers])
            ratios = lossless.ratios(model, counts) or {
                "acceptance": None, "tokens_per_pass": None, "bytes_to_full": active / full}
            rows.append({"method": variant.name, "set": name, "n": n,
                         "accuracy %": 100 * statistics.fmean(right),
                         "accuracy ±": 100 * standard_error(right),
                         "equal %": 100 * statistics.fmean(equal), **ratios,
                         "ms per token": ms, "ms per token ±": error})
    return report.show(args, rows, draw, experiment=experiment)


def draw(figure, rows):
    """Accuracy against bytes: lossy answers are dots, verified ones crosses with their n."""
    axes = figure.subplots()
    for method, color in report.colors(rows).items():
        for row in rows:
            if row["method"] != method or method == "full":
                continue
            point = row["bytes_to_full"], row["accuracy %"]
            lossy = row["n"] is None
            axes.errorbar(*point, row["accuracy ±"], marker="o" if lossy else "x", color=color,
                          capsize=2, elinewidth=0.5, label=method if lossy else None)
            if not lossy:
                axes.annotate(row["n"], point, (2, 4), textcoords="offset points", fontsize=7,
                              color=color)
    axes.axhline(rows[0]["accuracy %"], color="black", linestyle="--", label="full")
    axes.set(xlabel="bytes for each token, full model = 1; crosses: verified, with n",
             ylabel="accuracy %")


if __name__ == "__main__":
    sample.run_command(main)
