"""The measurement of bench.py beside transformers' generate: python -m beyond.peers

Each row of bench.py has a second one, in which the causal model of Hugging Face transformers
decodes by its own generate(). Both models have the very same weights in memory. A sparse row has
our sparse FF blocks attached within transformers' model, so that generate() is all that differs.
The flags are those of bench.py; without --only the rows are the full model and GRIFFIN + Caprese.
"""

import importlib.util
import sys
from functools import partial

import torch

import bench
import caprese
import sample

DEFAULT_ROWS = ["full", "GRIFFIN + Caprese"]
TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64}


# ---- transformers' model

def make_peer(model, config):
    """transformers' model of config.json's dictionary, on the very same weights in memory.

    model is a Transformer without sparse layers. Raises ValueError if transformers would compute
    with a tensor that the model does not have.
    """
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    weights = model.state_dict()
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # a tied head
    peer.load_state_dict(weights, assign=True)
    peer.tie_weights()
    # What follows from the config is in no checkpoint, so it is still on the meta device.
    with torch.device(model.device):
        peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
        if hasattr(peer.model.embed_tokens, "embed_scale"):  # Gemma
            peer.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size ** 0.5)
    for name, tensor in [*peer.named_parameters(), *peer.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"it has a tensor {name}, which is unknown here")
    return peer


class FirstToken:
    """A stopping criterion that never stops. It notes when the first token is there."""
    time = None

    def __call__(self, tokens, scores, **kwargs):
        if self.time is None:
            self.time = bench.clock(tokens.device)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def generate(peer, prompt, count, first_token):
    """The next `count` tokens [1, count] of transformers' own greedy loop; prompt is [1, S]."""
    from transformers import StoppingCriteriaList
    tokens = peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                           max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
                           stopping_criteria=StoppingCriteriaList([first_token]))
    return tokens[:, prompt.shape[1]:]


def check_transformers(model_type):
    """Let a tiny model of this family generate two tokens, full and sparse, in both libraries.

    Raises ValueError if transformers is missing, if it fails, or if its tokens are others than
    ours: then its times would mean nothing.
    """
    if not importlib.util.find_spec("transformers"):
        raise ValueError("transformers is missing: pip install transformers")
    import transformers
    config = TINY | {"model_type": model_type, "tie_word_embeddings": True}
    prompt = torch.arange(9)[None]
    try:
        torch.manual_seed(0)
        model = bench.random_model(config, "cpu", torch.float32)
        peer = make_peer(model, config)
        for settings in (None, {"method": "griffin", "rank": 4}):
            bench.set_method(model, settings)
            bench.set_method(peer, settings)
            theirs = generate(peer, prompt, 2, FirstToken())
            if not torch.equal(theirs, sample.generate(model, prompt, 2)):
                raise ValueError("its tokens are others than ours")
    except Exception as error:  # whatever another version does
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"transformers {transformers.__version__} does not fit: a tiny model of "
                         f"the family {model_type} fails there ({reason})") from None


# ---- the measurement

def time_peer(peer, prompt, generated):
    """(seconds to the first token, seconds to the last) of transformers' generate."""
    first_token = FirstToken()
    start = bench.clock(prompt.device)
    generate(peer, prompt, generated, first_token)
    end = bench.clock(prompt.device)
    return first_token.time - start, end - start


def run_peer(model, peer, settings, prompt, generated):
    """One row of one round, as bench.run_row: attach, warm up, measure."""
    bench.set_method(model, settings)  # bench.account counts what ours reads
    bench.set_method(peer, settings)
    time_peer(peer, prompt, generated if prompt.is_cuda else min(generated, 3))
    prefill, total = time_peer(peer, prompt, generated)
    row = bench.account(model, prompt.shape[1], generated)
    row |= bench.times(peer, prefill, total, generated)
    return row | {"copies MB": bench.copies(peer) / 1e6}


def measure(model, peer, rows, args):
    """The results of bench.measure; behind each row that of transformers.

    The ratio to full is that to our full model.
    """
    prompt = bench.make_prompt(model, args)
    runs = {}
    for generated in args.generate:
        for name, settings in rows.items():
            runs[name, generated] = partial(bench.run_row, model, settings, prompt, generated, None)
            runs[f"transformers, {name}", generated] = partial(
                run_peer, model, peer, settings, prompt, generated)
    rounds = bench.take_turns(runs, args.repeats, model.device)
    caprese.detach(model)
    caprese.detach(peer)
    results = []
    for generated in args.generate:
        for name in rows:
            results.append(bench.result(name, generated, rounds))
            theirs = bench.result(f"transformers, {name}", generated, rounds)
            # Their ratio is one to our full model, so it is no saving.
            results.append(theirs | {"saving reached": None})
    return results


# ---- python -m beyond.peers

def arguments(argv=None):
    """The command line of bench.py; ValueError for what transformers does not do."""
    args = bench.arguments(argv, description=__doc__.splitlines()[0])
    args.only = args.only or DEFAULT_ROWS
    if args.reselect:
        raise ValueError("transformers' own loop does not reselect: leave out --reselect")
    return args


def main():
    args = arguments()
    rows = bench.variants(args)
    check_transformers(args.config["model_type"])
    out = sys.stderr if args.json else sys.stdout
    bench.announce(args, out)
    print("transformers' rows are its own generate() on the same weights.", file=out)
    model = bench.make_model(args)
    peer = make_peer(model, args.config)
    bench.report(model, measure(model, peer, rows, args), args, out)


if __name__ == "__main__":
    sample.run_command(main)
