"""Train the bundled model from scratch: python models/tiny-math/pretrain.py

Next-token training on the responses to problems that data.py makes, half an hour on 2 CPU cores.
It writes the folder that this file stands in. An interrupted run continues where it last wrote its
state, every 100 steps, when the same command is given again.
"""

import argparse
import json
import math
import os
import random
import sys
from pathlib import Path

import torch
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, trainers)
from torch.nn import functional as F
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
import caprese  # noqa: E402
import data  # noqa: E402
import sample  # noqa: E402
from model import Config, Transformer  # noqa: E402

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]  # ids 0, 1, 2
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
            "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
VOCAB_SIZE = 1024
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
          "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
          "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
          "bos_token_id": None, "eos_token_id": 0, "torch_dtype": "bfloat16"}
GROUP = 16         # batches whose rows are sorted by length together
QUESTIONS = 4      # at most, on one passage
WARM_UP = 100      # steps until the learning rate is reached
SAVE_EVERY = 100   # steps


def write(file, text):
    """Write a text file under a temporary name, then rename."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, file)


# ---- tokenizer

def make_tokenizer(folder):
    """Byte-level BPE, learned on training problems. A digit, with a space before it, is a token.

    Every text gets a space in front, so that a name is the same token wherever it stands.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    digit = pre_tokenizers.Split(Regex(r" ?\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digit, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    texts = []
    for kind in ("maths", "reading"):
        for problem in data.problems(kind, 4000, seed=0):
            texts += [data.ask(problem), problem.response]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, normalized=False) for text in SPECIAL],
        show_progress=False))
    write(folder / "tokenizer.json", tokenizer.to_str())
    write(folder / "tokenizer_config.json", json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512,
        "eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE}, indent=2))


# ---- training data

def make_chat(rng, progress):
    """[(question, response)], the turns of a chat without a held-out problem; perhaps none.

    progress in [0, 1] is how far the training is. Passages grow from 2 or 3 facts to their full
    length within its first 40%: on long ones alone the model does not learn to find a fact. They
    are asked about several times, as that teaches more for the same tokens.
    """
    if rng.random() < (1 / 2 if progress < 0.2 else 2 / 3):
        problem = data.make_maths(rng)
        return [] if data.held_out(problem.question) else [(data.ask(problem), problem.response)]
    facts, people = rng.randint(14, 16), rng.randint(5, 8)
    if progress < 0.4:
        facts = rng.randint(2, 3 + round(13 * progress / 0.4))
        people = rng.randint(2, min(8, facts))
    passage, questions = data.make_passage(rng, people, facts)
    rng.shuffle(questions)
    turns = []
    for question, response, _ in questions[:QUESTIONS]:
        if not data.held_out(f"{passage} {question}"):
            asked = question if turns else f"{passage} {question}"
            turns.append((asked, response))
    return turns


def encode_chat(tokenizer, turns):
    """Turns -> (ids, mask), lists of equal length: True where a token is to be learned."""
    ids, mask = [], []
    for question, response in turns:
        prompt = tokenizer.encode(f"<|user|>{question}<|assistant|>")
        answer = tokenizer.encode(response) + [0]
        ids += prompt + answer
        mask += [False] * len(prompt) + [True] * len(answer)
    return ids, mask


def group_of_batches(tokenizer, args, group):
    """GROUP batches (tokens [B, T] int64, mask [B, T] bool), of chats that are not held out."""
    rng = random.Random(f"{args.seed} {group}")
    chats = []
    while len(chats) < args.batch_size * GROUP:
        turns = make_chat(rng, group * GROUP / args.steps)
        if turns:
            chats.append(encode_chat(tokenizer, turns))
    chats.sort(key=lambda chat: len(chat[0]))  # those of one batch have similar lengths
    found = []
    for start in range(0, len(chats), args.batch_size):
        chunk = chats[start:start + args.batch_size]
        tokens, _ = data.pad([ids for ids, _ in chunk])
        mask, _ = data.pad([mask for _, mask in chunk])
        found.append((tokens, mask.bool()))
    rng.shuffle(found)
    return found


# ---- training

def initialise(model):
    """Normal weights, smaller where a matrix ends in the residual stream; norms stay at one."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            ends = "o_proj" in name or "down_proj" in name
            std = 0.04 / math.sqrt(2 * len(model.model.layers)) if ends else 0.04
            torch.nn.init.normal_(parameter, std=std)


def learning_rate(step, args):
    """Up within WARM_UP steps, level, then down to zero over the last 60% of the steps."""
    return args.lr * min(1, (step + 1) / WARM_UP, (args.steps - step) / (0.6 * args.steps))


def make_optimizers(model, lr):
    """Muon for the matrices of the layers, AdamW for the rest; one learning rate suits both."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if ".layers." in name and parameter.dim() == 2 else others).append(parameter)
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def state_tensors(model, optimizers):
    """{name: tensor} of all that training changes: weights, and what the optimizers remember."""
    tensors = dict(model.state_dict())
    for number, optimizer in enumerate(optimizers):
        for i, memory in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{i}.{key}": value for key, value in memory.items()}
    return tensors


def load_state(file, model, optimizers, args):
    """Take up an interrupted run; returns its next step, 0 if there is none to take up."""
    if not file.exists():
        return 0
    tensors, about = caprese.load_tensors(file)
    if about["settings"] != settings(args):
        raise ValueError(f"{file} is of a run with other settings; delete it, or give them again")
    memories = [{} for _ in optimizers]
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        _, number, i, key = name.split(".")
        memories[int(number)].setdefault(int(i), {})[key] = tensors.pop(name)
    model.load_state_dict(tensors)
    for optimizer, memory in zip(optimizers, memories):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": memory})
    return about["step"]


def settings(args):
    """What both parts of an interrupted run have in common."""
    return {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}


def train(model, tokenizer, args, state_file):
    """All steps of the training, from the state on disk if there is one."""
    optimizers = make_optimizers(model, args.lr)
    first, group = load_state(state_file, model, optimizers, args), None
    bar = tqdm(range(first, args.steps), "pretraining", args.steps, initial=first, mininterval=1)
    for step in bar:
        if group is None or step % GROUP == 0:
            group = group_of_batches(tokenizer, args, step // GROUP)
        tokens, mask = (tensor.to(model.device) for tensor in group[step % GROUP])
        learned = mask[:, 1:]  # position i predicts token i + 1
        hidden_states = model.model(tokens[:, :-1])[learned]
        loss = F.cross_entropy(model.logits(hidden_states), tokens[:, 1:][learned])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, args)
            optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            caprese.save_tensors(state_tensors(model, optimizers), state_file,
                                 {"step": step + 1, "settings": settings(args)})


def save(model, file):
    """Write the weights in bfloat16, under a temporary name first."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    from safetensors.torch import save_file
    save_file(state, f"{file}.tmp", metadata={"format": "pt"})
    os.replace(f"{file}.tmp", file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=FOLDER, help="folder to write (default: %(default)s)")
    add("--steps", type=int, default=2400, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="chats a step (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="default: %(default)s")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    make_tokenizer(args.out)
    tokenizer = data.Tokenizer(args.out)
    config = CONFIG | {"vocab_size": tokenizer.tokenizer.get_vocab_size()}
    write(args.out / "config.json", json.dumps(config, indent=2))
    model = Transformer(Config.from_dict(config))
    initialise(model)
    model.to(args.device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"Training {count:,} parameters on {args.device}: {args.steps} steps of "
          f"{args.batch_size} chats.\nThe state is in {args.out / 'training.state'}.")
    state_file = args.out / "training.state"
    train(model, tokenizer, args, state_file)
    save(model, args.out / "model.safetensors")
    state_file.unlink(missing_ok=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sample.run_command(main)
