"""Every table and figure of the paper, one after the other: python -m paper"""

from paper import common

SCRIPTS = ("table1_accuracy", "table3_reselection", "table5_latency", "table6_lora", "table7_int4",
           "figure2_residual", "figure3_coverage", "figure4_length", "figure5_density",
           "figure6_parameters", "figure8_spectrum", "time_to_right_answer", "lossless",
           "in_transformers")

if __name__ == "__main__":
    common.main(*SCRIPTS)
