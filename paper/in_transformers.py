"""Ours: the same answers, and the time of a token, in a model of transformers.

caprese.attach works on the causal models of Hugging Face transformers as on our own: their
generate() decodes, and hooks tell prompt from decoding (beyond/in_transformers.py). Here both have
the very same weights in memory and answer the same problems, greedily, each problem alone.
"""

import importlib.util
import statistics

import torch

import caprese
import sample
from model import read_json, resolve
from paper import common, report
from paper.experiment import Experiment
from paper.scores import correct, ratio, standard_error


def attach_the_same(peer, model):
    """Give the peer the sparse layers of our model, with their corrections."""
    caprese.detach(peer)
    layers = caprese.sparse_layers(model)
    if layers:
        ff = next(iter(layers.values()))
        caprese.attach(peer, type(ff), ff.density, list(layers))
    for i, ff in caprese.sparse_layers(peer).items():
        ff.set_adapter(**layers[i].adapter_parameters())


def main(argv=None):
    """A row for each variant: right answers and ms per token, of our loop and of transformers'."""
    args = common.arguments("paper.in_transformers", __doc__, argv, limit=(40, 200))
    if not importlib.util.find_spec("transformers"):
        raise common.CannotRun("this needs transformers: pip install transformers")
    try:
        from beyond import in_transformers, peers
    except ImportError as error:
        raise common.CannotRun(f"this measures beyond/in_transformers.py ({error})") from None
    experiment = Experiment(args)
    stop_ids, limit = experiment.tokenizer.stop_ids, args.max_new_tokens
    folder = resolve(args.model or sample.BUNDLED)
    peer = peers.make_peer(experiment.model, read_json(folder / "config.json"))
    name, problems = experiment.graded()

    def ours(prompt):
        return sample.generate(experiment.model, prompt, limit, stop_ids=stop_ids)

    def theirs(prompt):
        tokens = peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                               max_new_tokens=limit, eos_token_id=list(stop_ids), pad_token_id=0)
        return tokens[:, prompt.shape[1]:]

    rows = []
    for variant in common.variants(args, ("griffin",)):
        attach_the_same(peer, experiment.prepare(variant))
        row, answers = {"method": variant.name, "set": name}, []
        for prefix, generate in (("", ours), ("transformers ", theirs)):
            found, texts, seconds = experiment.answer_alone(problems, generate)
            answers.append(found)
            right = [float(correct(text, p.answer)) for text, p in zip(texts, problems)]
            ms, error = ratio([1e3 * s for s in seconds], [len(ids) for ids in found])
            row |= {f"{prefix}accuracy %": 100 * statistics.fmean(right),
                    f"{prefix}accuracy ±": 100 * standard_error(right),
                    f"{prefix}ms per token": ms, f"{prefix}ms per token ±": error}
        equal = sum(one == other for one, other in zip(*answers))
        rows.append(row | {"equal answers %": 100 * equal / len(problems)})
    return report.show(args, rows, draw, experiment=experiment)


def draw(figure, rows):
    """Right answers, and the time of a token: a pair of bars for each variant."""
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("accuracy %", "ms per token")):
        for prefix, label, shift in (("", "sample.generate", -0.2),
                                     ("transformers ", "generate() of transformers", 0.2)):
            values = [row[prefix + column] for row in rows]
            axes.barh([i + shift for i in range(len(rows))], values, 0.4, label=label, capsize=2,
                      xerr=report.errors(rows, prefix + column))
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set_xlabel(column)
    panels[0].invert_yaxis()


if __name__ == "__main__":
    sample.run_command(main)
