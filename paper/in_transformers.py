"""Ours: the same answers, and the time of a token, in a model of transformers.

caprese.attach works on the causal models of Hugging Face transformers as on our own: their
generate() decodes, and hooks tell prompt from decoding. Here both have the very same weights in
memory and answer the same problems, greedily, each problem alone.
"""

import time

from paper import common

import torch

import bench
import caprese
import data
import sample
from model import read_json, resolve

NEEDS = ("graded", "transformers")
QUICK = {"limit": 40}
FULL = {"limit": 200}


def attach_the_same(peer, model):
    """Give the peer the sparse layers of our model, with their corrections."""
    caprese.detach(peer)
    layers = caprese.sparse_layers(model)
    if layers:
        ff = next(iter(layers.values()))
        caprese.attach(peer, ff.method, ff.density, list(layers))
    for i, ff in caprese.sparse_layers(peer).items():
        ff.set_adapter(layers[i].L, layers[i].R)


def answer(model, prompt, experiment):
    """New token ids of a greedy answer to a prompt [1, S], by our loop or by transformers'."""
    limit, stop_ids = experiment.args.max_new_tokens, experiment.tokenizer.stop_ids
    if model is experiment.model:
        return sample.generate(model, prompt, limit, stop_ids=stop_ids)[0].tolist()
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                            max_new_tokens=limit, eos_token_id=list(stop_ids), pad_token_id=0)
    return tokens[0, prompt.shape[1]:].tolist()


def answer_all(model, problems, experiment, prefix):
    """(the token ids of all answers, columns: their accuracy and ms per token)."""
    answers, right, start = [], 0, time.perf_counter()
    for problem in problems:
        ids = experiment.tokenizer.prompt_ids(data.ask(problem))
        answers.append(answer(model, torch.tensor([ids], device=model.device), experiment))
        right += data.correct(experiment.tokenizer.decode(answers[-1]), problem.answer)
    seconds = time.perf_counter() - start
    return answers, {f"{prefix}accuracy %": 100 * right / len(problems),
                     f"{prefix}ms per token": 1e3 * seconds / sum(map(len, answers))}


def measure(experiment):
    """A row for each variant: right answers and ms per token, of our loop and of transformers'."""
    folder, rows = resolve(experiment.args.model or sample.BUNDLED), []
    peer = bench.make_peer(experiment.model, read_json(folder / "config.json"))
    _, problems = experiment.graded()
    for variant in experiment.variants(("griffin",)):
        model = experiment.prepare(variant)
        attach_the_same(peer, model)
        ours, columns = answer_all(model, problems, experiment, "")
        theirs, their_columns = answer_all(peer, problems, experiment, "transformers ")
        equal = sum(one == other for one, other in zip(ours, theirs))
        rows.append({"method": variant.name, **columns, **their_columns,
                     "equal answers %": 100 * equal / len(problems)})
    return rows


def draw(figure, rows):
    """Right answers: a pair of bars for each variant, ours and transformers'."""
    axes = figure.subplots()
    names = [row["method"] for row in rows]
    positions = range(len(rows))
    axes.barh([p - 0.2 for p in positions], [row["accuracy %"] for row in rows], 0.4,
              label="sample.generate")
    axes.barh([p + 0.2 for p in positions], [row["transformers accuracy %"] for row in rows], 0.4,
              label="generate() of transformers")
    axes.set_yticks(list(positions), names)
    axes.invert_yaxis()
    axes.set_xlabel("right answers, %")


if __name__ == "__main__":
    common.main("in_transformers")
