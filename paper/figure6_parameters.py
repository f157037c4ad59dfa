"""Figure 6: the parameters that L and R add, in percent of the model's own.

The paper claims that r = 256 adds 0.8 to 1.3% of all parameters, which is 1.2 to 2% of the FF's.
Both follow from the shapes alone. Its two numbers are those of L and R in all layers, as for CATS;
GRIFFIN has them in the first half of the layers alone.
"""

import torch

import bench
import caprese
import sample
from model import Config, Transformer
from paper import common, report

PAPER = {"r = 256": [{"models": "theirs", "percent of all": "0.8 to 1.3",
                      "percent of the FF": "1.2 to 2"}]}



def main(argv=None):
    """A row for each model of the paper, made without memory for its weights."""
    args = common.arguments("paper.figure6_parameters", __doc__, argv, rank=(256, 256),
                            refuses=("method", "block", "adapter"))
    rows = []
    for name, config in bench.SHAPES.items():
        with torch.device("meta"):
            model = Transformer(Config.from_dict(config))
        total = sum(p.numel() for p in model.parameters())
        ff = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
        half = 100 * caprese.added_parameters(caprese.attach(model, "griffin", rank=args.rank))
        everywhere = 100 * caprese.added_parameters(caprese.attach(model, "cats", rank=args.rank))
        rows.append({"model": name, "parameters (M)": total / 1e6, "D": config["hidden_size"],
                     "rank": args.rank, "first half %": half, "all layers %": everywhere,
                     "all layers, % of the FF": everywhere * total / ff})
    return report.show(args, rows, draw, PAPER, title=f"r = {args.rank}")


def draw(figure, rows):
    """Two bars for each model; grey is the range that the paper states."""
    axes = figure.subplots()
    names = [f"{row['model']}, D = {row['D']}" for row in rows]
    axes.axvspan(0.8, 1.3, color="#dddddd", label="the paper, r = 256")
    axes.barh(names, [row["all layers %"] for row in rows], color="#a63603",
              label="L R in all layers (CATS)")
    axes.barh(names, [row["first half %"] for row in rows], height=0.4, color="#08519c",
              label="in the first half (GRIFFIN)")
    axes.invert_yaxis()
    axes.set(xlabel="added parameters, % of the model's")


if __name__ == "__main__":
    sample.run_command(main)
