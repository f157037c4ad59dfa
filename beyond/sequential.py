"""Equation (7) block by block: python distill.py --layerwise sequential. Ours, not the paper's.

The paper fits every FF block on the inputs that the full model makes. In use, a block gets what the
sparse blocks before it make, and their errors come along. Here the blocks are fitted one after the
other. The input x is that of the sparse model, with the fits that are already there, and the target
e is what takes the layer's output to the full model's. So a fit also mends what those before it
could not. Each fit is the exact minimiser of |e - x L R|^2, as in distill.py.
"""

import math
from dataclasses import dataclass

import torch

import caprese
import data
import distill
import sample

MAX_WAITING_TOKENS = 1 << 20  # whose states wait between two blocks: 17 GB at D = 4096, bfloat16


@torch.no_grad()
def fit(model, samples, micro_batch, checkpoint=None):
    """Fit L and R of every sparse layer, the first one first.

    samples are those of data.encode_samples; micro_batch of them pass through a block at once.
    checkpoint is a distill.Checkpoint, which is written after each fit. Raises ValueError if the
    correction is not x L R, if a number overflows, or for a model of transformers.
    """
    check(model)
    layers = caprese.sparse_layers(model)
    last = max(layers)
    for ff in layers.values():
        ff.R.zero_()  # what is not fitted yet corrects nothing
    learned = caprese.adapter_parameters(model)
    num_fitted = checkpoint.restore("layer-wise", learned) if checkpoint else 0  # of the blocks
    if num_fitted > last:
        return
    batches = make_batches(model, samples, micro_batch)
    full_states = [model.model.embed(batch.tokens).cpu() for batch in batches]  # [B, T, D] each
    sparse_states = list(full_states)
    for i in sample.progress(range(last + 1), "block by block", last + 1):
        learns = i in layers and i >= num_fitted
        pass_block(model, i, batches, full_states, sparse_states, learns)
        if learns and checkpoint:
            checkpoint.save("layer-wise", i + 1, learned)


def check(model):
    """ValueError, in one line, for what cannot be fitted block by block."""
    if caprese.of_transformers(model):
        raise ValueError("a model of transformers cannot be fitted block by block; "
                         "take distill.fit_closed_form")
    distill.check_closed_form(model)


def make_batches(model, samples, micro_batch):
    """This process's Batches of every n-th sample, so that at most MAX_WAITING_TOKENS wait."""
    num_tokens = sum(len(prompt) + len(response) for prompt, response in samples)
    samples = samples[::math.ceil(num_tokens / MAX_WAITING_TOKENS)]
    by_length = data.batch_indices(samples, len(samples))[0]
    return list(distill.micro_batches(samples, by_length, micro_batch, model.device))


def pass_block(model, i, batches, full_states, sparse_states, learns):
    """Take the states of both models through layer i, in place; fit its L and R if it learns.

    full_states and sparse_states are the layer's inputs [B, T, D] of each batch. They wait on the
    host.
    """
    layer = model.model.layers[i]
    if learns:
        A, C = distill.new_moments(layer.mlp)
    for j, batch in enumerate(batches):
        full = run_layer(model, i, batch, full_states[j], "full")
        full_states[j] = full.output.cpu()
        if learns:
            sparse = run_layer(model, i, batch, sparse_states[j], "teacher_forced")
            e = full.output - sparse.output
            if model.config.post_norms:  # Gemma 2: a norm stands between the FF and the output
                e = full.ff_output - sparse.ff_output
            distill.add_moments(A, C, sparse.ff_input[batch.response], e[batch.response])
    if learns:
        distill.fit(layer.mlp, A, C)
    if i == max(caprese.sparse_layers(model)):
        return  # no block after it needs the sparse states
    for j, batch in enumerate(batches):
        sparse = run_layer(model, i, batch, sparse_states[j], "teacher_forced")
        sparse_states[j] = sparse.output.cpu()


@dataclass
class LayerRun:
    """What a layer and its FF have made of a batch, [B, T, D] each."""
    output: torch.Tensor
    ff_input: torch.Tensor
    ff_output: torch.Tensor


def run_layer(model, i, batch, states, phase):
    """Run layer i on its inputs, states [B, T, D], in a phase of the model: a LayerRun."""
    layer = model.model.layers[i]
    ff_runs = []

    def record(ff, inputs, output):
        ff_runs.append((inputs[0], output))

    hook = layer.mlp.register_forward_hook(record)
    try:
        with caprese.phase(model, phase, generated=batch.generated):
            inputs = model.model.layer_inputs(batch.tokens)[i]
            output = layer(states.to(model.device), *inputs)
    finally:
        hook.remove()
    ff_input, ff_output = ff_runs[0]
    return LayerRun(output, ff_input, ff_output)
