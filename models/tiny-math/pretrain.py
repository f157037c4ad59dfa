"""Train the bundled model from scratch: python models/tiny-math/pretrain.py (under an hour on 2 CPU cores).

Next-token training on the responses of problems that data.py makes; writes the folder this file stands in.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import data  # noqa: E402
from model import Config, Transformer  # noqa: E402

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]  # ids 0, 1, 2
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
            "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def make_tokenizer(folder, vocab_size=512):
    """Byte-level BPE in which a digit, with the space before it, is a token; trained on the training side."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    texts = [f"{data.INSTRUCTION} {p.question} {p.response}" for kind in ("maths", "reading")
             for p in data.problems(kind, 4000, seed=0)]
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[AddedToken(t, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    write(folder / "tokenizer.json", tok.to_str())
    write(folder / "tokenizer_config.json", json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0], "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE}, indent=2))


def make_config(folder, vocab_size):
    """Write config.json; the model has 1.25M parameters, 71% of them in the FF blocks."""
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 128,
        "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "torch_dtype": "bfloat16"}
    write(folder / "config.json", json.dumps(raw, indent=2))
    return Config.from_dict(raw)


def write(file, text):
    """Write a text file under a temporary name, then rename."""
    file.with_suffix(".tmp").write_text(text + "\n", encoding="utf-8")
    os.replace(file.with_suffix(".tmp"), file)


def initialise(model):
    """Normal weights, smaller where a matrix ends in the residual stream; norms stay at one."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            shrink = math.sqrt(2 * len(model.model.layers)) if "o_proj" in name or "down_proj" in name else 1
            torch.nn.init.normal_(p, std=0.04 / shrink)


def batches(tokenizer, size, seed):
    """Endless (tokens [B, T], mask [B, T]): two maths problems for each reading one, none of them held out.

    The mask marks the response and its <|end|>, which is all that is learned.
    """
    rng = random.Random(seed)
    while True:
        rows = []
        while len(rows) < size * 16:
            p = data.make_reading(rng) if rng.random() < 1 / 3 else data.make_maths(rng)
            if not data.held_out(p.question):
                rows.append((tokenizer.encode(tokenizer.prompt(data.ask(p))), tokenizer.encode(p.response) + [0]))
        rows.sort(key=lambda r: len(r[0]) + len(r[1]) + rng.random())  # rows of one batch: of similar length
        chunks = [rows[i:i + size] for i in range(0, len(rows), size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            tokens, lengths = data.pad([p + r for p, r in chunk])
            at = torch.arange(tokens.shape[1])
            yield tokens, (at >= torch.tensor([[len(p)] for p, _ in chunk])) & (at < lengths[:, None])


def train(model, stream, steps, lr):
    """Adjust all weights for `steps` batches: 100 steps of warm-up, level, then down to zero over the last 60%."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    # Muon gets there in about half of AdamW's steps; adjusted so that one learning rate suits both.
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
    shape = lambda i: min(1, (i + 1) / 100, (steps - i) / (0.6 * steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, shape) for o in optimizers]
    bar = tqdm(range(steps), mininterval=1)
    for step in bar:
        tokens, mask = (t.to(model.device) for t in next(stream))
        here = mask[:, 1:]  # position i predicts token i + 1
        hidden_states = model.model(tokens[:, :-1])[here]
        loss = F.cross_entropy(model.logits(hidden_states), tokens[:, 1:][here])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers + schedules:
            each.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def save(model, file):
    """Weights in bfloat16, under a temporary name first."""
    state = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, f"{file}.tmp", metadata={"format": "pt"})
    os.replace(f"{file}.tmp", file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=64, help="problems a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    make_tokenizer(args.out)
    tokenizer = data.Tokenizer(args.out)
    model = Transformer(make_config(args.out, tokenizer.tokenizer.get_vocab_size()))
    initialise(model)
    model.to(args.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"training {count:,} parameters on {args.device}: {args.steps} steps of {args.batch} problems")
    start = time.time()
    train(model, batches(tokenizer, args.batch, args.seed), args.steps, args.lr)
    save(model, args.out / "model.safetensors")
    print(f"wrote {args.out} after {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
