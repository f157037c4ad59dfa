"""An experiment as a fork makes it: another statistic, with its row beside GRIFFIN's.

GRIFFIN scales every token to length one before it counts, so that all tokens weigh the same. Here
a token counts with its own size: a neuron is worth keeping if the mean of |z| over the prompt is
large. Run it by the ordinary command, and compare its rows with those of --method griffin:

    python distill.py --block beyond.mean_abs:MeanAbs --out mean_abs.safetensors
    python sample.py --block beyond.mean_abs:MeanAbs --adapter mean_abs.safetensors
"""

import caprese


class MeanAbs(caprese.GRIFFIN):
    """Keeps the k neurons with the largest mean of |z|. s is a sum: it orders as the mean does."""

    def statistic(self, x, gate, z, counted=None):
        """z [B, T, F] -> s [B, F], over the tokens where counted [B, T] is True."""
        magnitudes = z.float().abs()
        if counted is not None:
            magnitudes = magnitudes * counted[..., None]
        return magnitudes.sum(dim=1)

    def merge(self, s, s_G):
        """Sums add up, where GRIFFIN's roots of squares take sqrt(s^2 + s_G^2)."""
        return s + s_G
