"""The sparse FF in the causal models of transformers: their generate(), our distillation.

    python -m beyond.in_transformers distill --model google/gemma-3-1b-it --data train.jsonl
    python -m beyond.in_transformers answer --model google/gemma-3-1b-it \\
        --adapter adapter.safetensors "your question"

caprese.attach and distill.py come here for a model that has `generate`. Its MLPs must compute
down_proj(act_fn(gate_proj(x)) * up_proj(x)) by plain weights without biases, as in most families.
In the models of transformers the decoding loop is not ours, so hooks tell the phase of each call
from the KV cache it carries.
"""

import argparse
import json
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import caprese
import data
import distill
import sample
from model import resolve

MATRICES = ("gate_proj", "up_proj", "down_proj")
NO_MODEL = "--model is needed: a folder, or a hub repo id"
PROGRAM = "python -m beyond.in_transformers"


# ---- which MLPs can be replaced

def check(model, indices):
    """Raise ValueError, which names the layer, if the MLP of a layer cannot be replaced."""
    for i in indices:
        layer = caprese.decoder(model).layers[i]
        check_parts(layer, f"layer {i} ({type(layer).__name__})")
        check_function(layer.mlp, f"the MLP of layer {i} ({type(layer.mlp).__name__})")


def check_parts(layer, where):
    """ValueError if a layer's MLP is more than three plain matrices, whose numbers are here."""
    if any(name.endswith("experts") for name, _ in layer.named_modules()):
        raise ValueError(f"{where} is a mixture of experts, which is not implemented")
    if not hasattr(layer, "mlp"):
        raise ValueError(f"{where} must have an mlp; it has {children(layer)}")
    if not all(hasattr(layer.mlp, name) for name in (*MATRICES, "act_fn")):
        raise ValueError(f"the MLP of {where} must have gate_proj, up_proj, down_proj and act_fn; "
                         f"it has {children(layer.mlp)}")
    for name in MATRICES:
        check_linear(getattr(layer.mlp, name), f"{name} in {where}")
    for module in (layer.mlp, *(getattr(layer.mlp, name) for name in MATRICES)):
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"the MLP of {where} has forward hooks, which a sparse FF would skip; "
                             "remove them first")


def check_linear(linear, where):
    """ValueError if a module is more than a matrix, or if its numbers are elsewhere."""
    if hasattr(linear, "base_layer"):
        raise ValueError(f"{where} is a layer of PEFT; attach to what merge_and_unload() returns")
    weight = getattr(linear, "weight", None)
    plain = type(linear) is nn.Linear and type(weight) is nn.Parameter
    if not plain or not weight.is_floating_point():
        raise ValueError(f"{where} is a {type(linear).__name__}, not a plain nn.Linear of floating-"
                         "point numbers; load the model unquantised and not sharded")
    if linear.bias is not None:
        raise ValueError(f"{where} has a bias; MLPs with biases are not implemented")
    if weight.is_meta:
        raise ValueError(f"{where} is offloaded (its weight is on the meta device); load the model "
                         "onto a device that holds all of it")


@torch.no_grad()
def check_function(mlp, where):
    """ValueError if an MLP computes anything but (act(x Wg) * (x W1)) W2, on two random tokens.

    One of them is large, so that clipping shows. Patched forwards and scaling show on both.
    """
    Wg, W1, W2 = (getattr(mlp, name).weight for name in MATRICES)
    x = torch.randn(1, 2, Wg.shape[1], generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([[1.0], [10.0]])).to(Wg.device, Wg.dtype)
    expected = F.linear(mlp.act_fn(F.linear(x, Wg)) * F.linear(x, W1), W2)
    found = mlp(x)
    same_shape = isinstance(found, torch.Tensor) and found.shape == expected.shape
    allowed = min(0.02, 100 * torch.finfo(Wg.dtype).eps) * expected.abs().amax(-1)
    if not same_shape or not ((found - expected).abs().amax(-1) <= allowed).all():
        raise ValueError(f"{where} does not compute down_proj(act_fn(gate_proj(x)) * up_proj(x)); "
                         "its forward was replaced, or its family scales or clips in between")


def children(module):
    """The names of a module's parts, as words."""
    return ", ".join(name for name, _ in module.named_children()) or "no parts"


# ---- the phase of each call

def watch(model, call):
    """Hook a model so that each of its calls has the right phase; returns the hooks' handles."""
    watcher = Watcher(model, call)
    base = caprese.decoder(model)
    return (model.register_forward_pre_hook(watcher.before_model, with_kwargs=True),
            base.register_forward_pre_hook(watcher.before_decoder, with_kwargs=True),
            base.register_forward_hook(watcher.after_decoder, always_call=True))


class Watcher:
    """Sets the phase of each call of a model from the KV cache that the call carries.

    An empty cache begins a prompt, more than one token goes on with it, and one token decodes. (So
    a prompt in chunks must not end in a chunk of one token, which would count as decoded.) What
    would use the full model under the sparse one's name raises ValueError. Within caprese.phase
    nothing is changed.

    The hooks are methods, whose object copy.deepcopy and torch.save copy with the model, and
    torch.compile leaves them alone. A copy has no selection that belongs to a cache, so it begins
    with a prompt.
    """

    def __init__(self, model, call):
        self.model, self.call = model, call
        self.filled = None  # (the cache that the selection belongs to, how many tokens it holds)

    def __getstate__(self):
        return self.__dict__ | {"filled": None}  # a weak reference cannot be written

    @torch.compiler.disable
    def before_model(self, model, args, kwargs):
        kept = kwargs.get("logits_to_keep")
        if not self.call.by_hand and isinstance(kept, int) and kept > 1:
            raise ValueError("assisted generation is refused: here the full model would answer")

    @torch.compiler.disable
    def before_decoder(self, decoder, args, kwargs):
        if self.call.by_hand:
            return None
        if self.model.training:
            raise ValueError("the sparse model is for inference: call model.eval() first")
        # By what it can do: transformers 5.24 renamed the argument past_key_values to cache.
        cache = next((v for v in kwargs.values() if hasattr(v, "get_seq_length")), None)
        if cache is None:
            raise ValueError("a call without a KV cache does not say what is the prompt: use "
                             "generate(), for the logits of a given text caprese.teacher_forced("
                             "model, tokens, prompt_lengths), for the full model caprese.detach")
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        start, count = int(cache.get_seq_length()), tokens.shape[1]
        self.check_cache(cache, start, count)
        self.filled = weakref.ref(cache), start + count
        if start > 0 and count == 1:
            self.call.phase = "decode"
            return None
        if start == 0:
            caprese.reset(self.model)
        self.call.phase = "count"
        self.call.counted = padding_mask(kwargs.get("attention_mask"), start, count)
        if "logits_to_keep" in kwargs:  # Gemma 4 would run some layers for the last token alone
            kwargs = kwargs | {"logits_to_keep": 0}
        return args, kwargs

    def check_cache(self, cache, start, count):
        """ValueError if `count` tokens after the `start` in a cache do not continue our prompt."""
        if start > 0 and self.filled != (weakref.ref(cache), start):
            raise ValueError("the selection is of another prompt than this KV cache: begin with an "
                             "empty cache, and let one sequence of calls end before the next")
        block = next(iter(caprese.sparse_layers(self.model).values()))
        if start > 0 and count > 1 and isinstance(block, caprese.CATS):
            raise ValueError("CATS' tau needs the whole prompt in one call, not in chunks")

    @torch.compiler.disable
    def after_decoder(self, decoder, args, output):
        if self.call.by_hand or self.call.phase == "full":  # the latter: the call was refused
            return
        counted, filled = self.call.phase == "count", self.filled
        self.call.phase, self.call.counted, self.filled = "full", None, None
        if output is None:  # the call has failed, so nothing may go on with its cache
            return
        if counted:
            caprese.select(self.model)
        self.filled = filled


def padding_mask(attention_mask, start, count):
    """Which of `count` tokens from position `start` on are no padding: bool [B, count], or None.

    attention_mask is what transformers gives to a decoder: None, [B, keys] of ones and zeros, or
    [B, 1, count, keys] of bools or of 0 and -inf, alone or in a dictionary by kinds of layers.
    Raises ValueError for any other.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask[min(attention_mask)]  # full before sliding_attention
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"an attention mask of type {type(attention_mask).__name__} cannot be "
                         "read; load the model with attn_implementation='sdpa'")
    if attention_mask.dim() == 2:
        return attention_mask[:, start:start + count].bool()
    # All tokens but padding see themselves, in a sliding window as well.
    start = min(start, attention_mask.shape[-1] - count)
    sees_itself = attention_mask[:, 0].diagonal(start, -2, -1)[:, :count]
    return sees_itself if sees_itself.dtype == torch.bool else sees_itself == 0


# ---- what distill.py asks of a model

def embeddings(model, tokens):
    """The final embeddings, after the last norm: tokens [B, T] int64 -> [B, T, D].

    Raises ValueError if the model is in training mode, where it may drop out.
    """
    if model.training:
        raise ValueError("the full model teaches without dropout: call model.eval() first")
    return caprese.decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state


def logits(model, hidden_states):
    """The head as the family applies it, soft-capped or scaled: [N, D] -> [N, V].

    The model's own forward runs on one token, whose final embedding is replaced by the given ones.
    """
    def replace(decoder, inputs, output):
        output.last_hidden_state = hidden_states[None]
        return output

    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    hook = caprese.decoder(model).register_forward_hook(replace)
    try:
        with caprese.phase(model, "full"):
            return model(token, use_cache=False).logits[0]
    finally:
        hook.remove()


def recompute_activations(model, wanted):
    """Turn gradient checkpointing on or off; ValueError if the model's layers have none.

    transformers recomputes a layer in training mode alone. Only the layer itself gets that flag and
    not its parts, so that nothing drops out.
    """
    layers = caprese.decoder(model).layers
    if wanted and not hasattr(layers[0], "gradient_checkpointing"):
        raise ValueError(f"the layers of {type(model).__name__} have no gradient checkpointing")
    for layer in layers:
        layer.gradient_checkpointing = layer.training = wanted
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


# ---- the commands

def load(args):
    """(transformers' model, our tokenizer) for the common flags; ValueError or OSError."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install transformers") from None
    sample.check_device(args.device)
    folder = resolve(args.model)
    dtype = sample.choose_dtype(args) or "auto"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (ValueError, OSError, RuntimeError) as error:
        first_line = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"transformers cannot load {args.model}: {first_line}") from None
    return model.to(args.device).eval(), data.Tokenizer(folder)


def generate(model, tokenizer, prompts, max_new_tokens):
    """The ids of a greedy answer to each of several prompts (lists of ids), by their generate()."""
    width = max(map(len, prompts))
    padding = [[0] * (width - len(prompt)) for prompt in prompts]
    tokens = torch.tensor([zeros + prompt for zeros, prompt in zip(padding, prompts)])
    mask = torch.tensor([zeros + [1] * len(prompt) for zeros, prompt in zip(padding, prompts)])
    output = model.generate(tokens.to(model.device), attention_mask=mask.to(model.device),
                            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0,
                            eos_token_id=list(tokenizer.stop_ids) or None)
    return [data.until_stop(ids, tokenizer.stop_ids) for ids in output[:, width:].tolist()]


def evaluate(model, tokenizer, problems, max_new_tokens, batch_size):
    """(accuracy, its standard error), both in [0, 1], of greedy answers to data.Problems."""
    prompts = [tokenizer.prompt_ids(data.ask(problem)) for problem in problems]
    right, batches = 0, data.batch_indices([[prompt] for prompt in prompts], batch_size)
    for indices in sample.progress(batches, "answers", len(batches)):
        answers = generate(model, tokenizer, [prompts[i] for i in indices], max_new_tokens)
        for i, ids in zip(indices, answers):
            right += data.correct(tokenizer.decode(ids), problems[i].answer)
    accuracy = right / len(problems)
    return accuracy, sample.standard_error(accuracy, len(problems))


def measure(model, tokenizer, unseen, args):
    """Columns of distill's table: the KL to the full model, and right answers to --problems."""
    row = distill.measure(model, tokenizer, unseen, args)
    for file in args.problems:
        name = Path(file).stem
        problems = data.read_problems(file, args.eval_samples, evaluation=True,
                                      boxed=args.boxed)
        row[f"{name} right"], row[f"{name} error"] = evaluate(
            model, tokenizer, problems, args.max_new_tokens, args.micro_batch)
    return row


def distill_command(argv):
    """distill.py's command on a model of transformers; --problems besides."""
    ours = argparse.ArgumentParser(add_help=False)
    ours.add_argument("--problems", action="append", default=[], metavar="FILE",
                      help="problems to answer, for the column of right answers")
    ours.add_argument("--boxed", action="store_true",
                      help="ask for the answer in a box, as an official chat model needs it")
    ours.add_argument("--max-new-tokens", type=sample.positive, default=512,
                      help="of an answer to --problems (default: %(default)s)")
    args = distill.arguments(argv, parents=[ours], prog=f"{PROGRAM} distill")
    if not args.model:
        raise ValueError(NO_MODEL)
    if args.layerwise == "sequential":
        raise ValueError("--layerwise sequential is for our own model.py: python distill.py")
    command = ["-m", "beyond.in_transformers", "answer"]
    distill.distill(args, load=load, measure=measure, command=command)


def answer_command(argv):
    """One prompt, three ways: full, sparse, sparse + Caprese."""
    parser = sample.common_arguments(sample.ArgumentParser(
        prog=f"{PROGRAM} answer", description=answer_command.__doc__))
    sample.method_arguments(parser)
    parser.add_argument("prompt")
    parser.add_argument("--adapter", required=True, help="file written by distill")
    parser.add_argument("--density", type=float, help="kept neurons (default: the adapter's)")
    parser.add_argument("--max-new-tokens", type=sample.positive, default=512)
    args = parser.parse_args(argv)
    if not args.model:
        raise ValueError(NO_MODEL)
    about = sample.read_about(args)  # a missing adapter is noticed at once
    model, tokenizer = load(args)
    prompt, rows = tokenizer.prompt_ids(args.prompt), []
    for name in ("full", "sparse", "sparse + Caprese"):
        if name == "sparse":
            caprese.attach(model, args.method or about["method"],
                           about["density"] if args.density is None else args.density,
                           about["layers"])
        elif name == "sparse + Caprese":
            caprese.load_adapter(model, args.adapter, args.density, args.method)
        start = time.perf_counter()
        ids = generate(model, tokenizer, [prompt], args.max_new_tokens)[0]
        rate = len(ids) / (time.perf_counter() - start)
        rows.append({"method": name, "response": tokenizer.decode(ids), "tokens": len(ids),
                     "tokens_per_second": round(rate, 1)})
        print(f"\n{name}: {sample.describe(model)}\n{rows[-1]['response']}\n"
              f"[{len(ids)} tokens, {rate:.1f} tokens/s]", flush=True,
              file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps({"prompt": args.prompt, "rows": rows}))


def main():
    commands = {"distill": distill_command, "answer": answer_command}
    parser = sample.ArgumentParser(prog=PROGRAM, description="Each command has its own --help.")
    parser.add_argument("command", choices=commands, metavar="{distill,answer}")
    commands[parser.parse_args(sys.argv[1:2]).command](sys.argv[2:])


if __name__ == "__main__":
    sample.run_command(main)
