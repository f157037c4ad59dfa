"""Every table and figure of the paper that can run, one after the other: python -m paper"""

import sys

import sample
from paper import (common, figure2_residual, figure3_coverage, figure4_length, figure5_density,
                   figure6_parameters, figure8_spectrum, in_transformers, lossless,
                   table1_accuracy, table3_reselection, table5_latency, table6_lora, table7_int4)

SCRIPTS = (table1_accuracy, table3_reselection, table5_latency, table6_lora, table7_int4,
           figure2_residual, figure3_coverage, figure4_length, figure5_density,
           figure6_parameters, figure8_spectrum, lossless, in_transformers)


def main(argv=None):
    """Run all scripts by the same flags. What a script needs and does not have is said."""
    common.arguments("paper", __doc__, argv)  # bad flags end here
    for script in SCRIPTS:
        try:
            script.main(argv)
        except common.CannotRun as error:
            print(f"{script.__name__} is left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    sample.run_command(main)
