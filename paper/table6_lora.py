"""Table 6: x L R against LoRA with equally many parameters, in GRIFFIN's sparse FF.

The paper claims (appendix C) that x L R is at least as good as LoRA, and faster, for it fuses into
the FF's own products (table 5). LoRA has no layer-wise stage, as its update has no closed form and
stands inside the FF. So like is compared with like: both learned end-to-end alone, from the same
samples, in the same steps. The row with both stages shows what x L R gains by the first one.
"""

from dataclasses import replace

from paper import common

import caprese
from paper.experiment import BOTH_STAGES, E2E, Variant
from paper.lora import LoRAFF

NEEDS = ("problems", "samples")


def measure(experiment):
    """A row for each correction: the parameters that it adds, and its scores on every set."""
    griffin = experiment.sparse("griffin")
    low_rank = experiment.learned(griffin, E2E, "GRIFFIN + L R, E2E alone")
    lora = replace(low_rank, name="GRIFFIN + LoRA, E2E alone", block=LoRAFF)
    both = experiment.learned(griffin, BOTH_STAGES)
    rows = []
    for variant in (Variant("full"), griffin, lora, low_rank, both):
        added = caprese.added_parameters(experiment.prepare(variant))
        row = {"method": variant.name, "added parameters %": 100 * added}
        rows.append(row | experiment.score_columns(variant))
    return rows


draw = common.draw_scores

if __name__ == "__main__":
    common.main("table6_lora")
