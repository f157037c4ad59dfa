"""Table 7: weights of 4 bits in place of sparsity, and the same x L R for the error of rounding.

The paper claims (appendix D) that Caprese is not bound to sparsity: L and R learn the residual of
an FF whose weights are rounded to 4 bits just as well. Here groups of 64 weights share a scale and
an offset. That shows the quality of 4 bits and not their speed, for the products run in the model's
dtype. So small a model as the bundled one loses nothing by 4 bits, and there is nothing to recover.
"""

import sample
from paper import common, report
from paper.experiment import Experiment


def main(argv=None):
    """A row for each stage: the parameters that it adds, and its scores on every set."""
    args = common.arguments("paper.table7_int4", __doc__, argv)
    experiment = Experiment(args)
    rows = experiment.rows(common.variants(args, ("int4",)))
    return report.show(args, rows, report.draw_scores, experiment=experiment)


if __name__ == "__main__":
    sample.run_command(main)
