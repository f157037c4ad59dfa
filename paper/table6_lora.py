"""Table 6: x L R against LoRA with equally many parameters, in GRIFFIN's sparse FF.

The paper claims (appendix C) that x L R is at least as good as LoRA, and faster, for it fuses into
the FF's own products (table 5). LoRA has no layer-wise stage, as its update has no closed form and
stands inside the FF. So like is compared with like: both learned end-to-end alone, from the same
samples, in the same steps. The row with both stages shows what x L R gains by the first one.
"""

from dataclasses import replace

import sample
from paper import common, report
from paper.experiment import Experiment
from paper.lora import LoRAFF


def main(argv=None):
    """A row for each correction: the parameters that it adds, and its scores on every set."""
    args = common.arguments("paper.table6_lora", __doc__, argv,
                            refuses=("method", "block", "adapter"))
    if args.e2e_epochs < 1:
        raise common.CannotRun("this compares what is learned end-to-end: give --e2e-epochs")
    experiment = Experiment(args, samples=True)
    griffin = common.sparse(args, "griffin")
    low_rank = replace(common.learned(args, griffin, ("E2E",)), name="GRIFFIN + L R, E2E alone")
    lora = replace(low_rank, name="GRIFFIN + LoRA, E2E alone", method=LoRAFF)
    both = common.learned(args, griffin, common.stages(args))
    rows = experiment.rows((common.Variant("full"), griffin, lora, low_rank, both))
    return report.show(args, rows, report.draw_scores, experiment=experiment)


if __name__ == "__main__":
    sample.run_command(main)
