"""Table 5: time to the next token at batch 1, of GRIFFIN alone, with LoRA, and with Caprese.

The paper claims that L and R add nothing to GRIFFIN's time, for they fuse into its products, while
LoRA of as many parameters does not fuse and costs almost half of what GRIFFIN saves. Halving the FF
in half of the layers saves at most 17% of the bytes that a token reads, and the paper's GRIFFIN
saves that.

The time depends on sizes alone, so the weights are random unless --model is given: of SmolLM2 135M,
with --full of Llama 3.2 1B, and on a GPU with --full of the paper's Qwen 2.5 14B. bench.py has
other shapes, lengths and rows. ± is the standard deviation of the rounds.
"""

import argparse
import statistics
from functools import partial

import bench
import sample
from model import read_json, resolve
from paper import common, report
from paper.lora import LoRAFF

QUICK = {"shape": "smollm2-135m", "prompt": 128, "generate": (32,), "repeats": 3}
FULL = {"shape": "llama-3.2-1b", "prompt": 128, "generate": (32, 256), "repeats": 5}
FULL_GPU = {"shape": "qwen2.5-14b", "prompt": 2048, "generate": (256, 2048), "repeats": 3}
COLUMNS = ("ms per token", "bound ms", "total s", "ratio to full", "ratio bytes allow",
           "ratio to uncorrected")

PAPER = {"Qwen 2.5 14B in bfloat16 on an L40, prompt of 2048 tokens": [
    {"method": "full", "ms to the next token": 41,
     "256 generated, s": 10.5, "2048, s": 84.4, "8192, s": 344.9},
    {"method": "GRIFFIN", "ms to the next token": 34,
     "256 generated, s": 8.7, "2048, s": 70.3, "8192, s": 287.7},
    {"method": "GRIFFIN + LoRA", "ms to the next token": 37,
     "256 generated, s": 9.5, "2048, s": 76.5, "8192, s": 312.5},
    {"method": "GRIFFIN + Caprese", "ms to the next token": 34,
     "256 generated, s": 8.7, "2048, s": 70.4, "8192, s": 288.8},
]}



def main(argv=None):
    """The rows of bench.py that the paper has, and LoRA's."""
    args = common.arguments("paper.table5_latency", __doc__, argv, rank=(0, 0),
                            refuses=("method", "block", "adapter"))
    chosen = FULL if args.full else QUICK
    if args.full and args.device.startswith("cuda"):
        chosen = FULL_GPU
    name = args.model or chosen["shape"]
    config = read_json(resolve(args.model) / "config.json") if args.model else bench.SHAPES[name]
    settings = argparse.Namespace(**vars(args) | chosen | {
        "config": config, "density": args.density or 0.5, "graphs": False, "method": "griffin",
        "only": ["full", "GRIFFIN", "GRIFFIN + Caprese"]})
    rows = bench.variants(settings)
    rows["GRIFFIN + LoRA"] = rows["GRIFFIN + Caprese"] | {"method": LoRAFF}
    model = bench.make_model(settings)
    prompt = bench.make_prompt(model, settings)
    runs = {(row, generated): partial(bench.run_row, model, rows[row], prompt, generated, None)
            for generated in settings.generate for row in rows}
    rounds = bench.take_turns(runs, settings.repeats, model.device)
    table = []
    for row, generated in runs:
        times = [one["ms per token"] for one in rounds[row, generated]]
        result = bench.result(row, generated, rounds)
        table.append({"method": row, "model": name, "generated": generated}
                     | {column: result[column] for column in COLUMNS}
                     | {"ms per token ±": statistics.stdev(times)})
    rank = rows["GRIFFIN + Caprese"]["rank"]
    title = f"{name}: D = {config['hidden_size']}, r = {rank}"
    return report.show(args, table, draw, PAPER, title=title)


def draw(figure, rows):
    """The time to the next token, and within each bar the time that its bytes take."""
    axes = figure.subplots()
    names = [f"{row['method']}, {row['generated']} generated" for row in rows]
    axes.barh(names, [row["ms per token"] for row in rows], capsize=2, label="measured",
              xerr=report.errors(rows, "ms per token"))
    axes.barh(names, [row["bound ms"] for row in rows], height=0.3, color="black",
              label="its bytes at the memory's speed")
    axes.invert_yaxis()
    axes.set_xlabel("ms to the next token")


if __name__ == "__main__":
    sample.run_command(main)
