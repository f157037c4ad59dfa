"""What beyond/forks.py refuses, and what it lets pass: python -m pytest tests/test_forks.py"""

import pytest
import tiny
import torch

import caprese
from beyond import forks  # noqa: F401  attach calls it


class OtherTraining(caprese.GRIFFIN):
    def teacher_forced(self, x, generated):
        return super().teacher_forced(x, generated) + 1


class OnlyFused(caprese.GRIFFIN):
    def fused(self, x):
        return 2 * super().fused(x)


class OneRow(caprese.GRIFFIN):
    def sparsify(self, x, gate, z, kept):
        return z * kept[:1, None]

    def selection(self, x, gate, z, counted):
        return super().selection(x, gate, z, counted).flip(0)


class NoMerge(caprese.GRIFFIN):
    """Its statistic is a sum, and it inherits GRIFFIN's merge."""
    def statistic(self, x, gate, z, counted=None):
        return (z.abs() if counted is None else z.abs() * counted[..., None]).sum(1)


class BadMerge(caprese.GRIFFIN):
    def merge(self, s, s_G):
        return s.no_such_thing


class Misspelt(caprese.GRIFFIN):
    def statistics(self, x, gate, z, counted=None):
        return z.abs().sum(1)


class MisspeltBesides(caprese.GRIFFIN):
    def sparsify(self, x, gate, z, kept):
        return 2 * z * kept[:, None]

    def corection(self, x):
        return 0 * x


class MisspeltInBetween(Misspelt):
    pass


class NoSuchName(caprese.GRIFFIN):
    def statistic(self, x, gate, z, counted):
        return torhc.ones(2, 64)  # noqa: F821


class OtherInit(caprese.GRIFFIN):
    def __init__(self, mlp):
        super().__init__(mlp, 0.5, 4, None)


class FailsLate(caprese.GRIFFIN):
    def gather(self, neurons):
        raise RuntimeError("first line\nsecond line")


class NoBatch(caprese.GRIFFIN):
    def statistic(self, x, gate, z, counted=None):
        return super().statistic(x, gate, z, counted).sum(0)


class AllTokens(caprese.GRIFFIN):
    def statistic(self, x, gate, z, counted=None):
        return z.abs()


class OneColumn(caprese.GRIFFIN):
    def sparsify(self, x, gate, z, kept):
        return z[..., :1] * kept[:, None, :1]


class FewArguments(caprese.GRIFFIN):
    def statistic(self, z):
        return z.norm(dim=1)


class OtherRowsCount(caprese.GRIFFIN):
    """A row's statistic is what it has more than the batch's mean: another one when alone."""
    def statistic(self, x, gate, z, counted=None):
        s = super().statistic(x, gate, z, counted)
        return s - s.mean(0)

    def merge(self, s, s_G):
        return s + s_G


class Uncounted(caprese.GRIFFIN):
    def statistic(self, x, gate, z, counted=None):
        return z.norm(dim=1)


class StatisticOfCATS(caprese.CATS):
    def statistic(self, x, gate, z, counted=None):
        return z.abs().sum(1)


class Unfinished(caprese.SparseFF):
    pass


@pytest.mark.parametrize("block, says", [
    (OtherTraining, "would learn another function than it decodes by"),
    (OnlyFused, "brings a gather or a fused that does not compute"),
    (OneRow, "would learn another function than it decodes by"),
    (NoMerge, "does not merge as GRIFFIN's does"),
    (BadMerge, "no attribute 'no_such_thing'; see test_forks.py, line .*no_such_thing"),
    (Misspelt, "statistics of .* looks like a misspelt statistic"),
    (MisspeltInBetween, "statistics of .* looks like a misspelt statistic"),
    (MisspeltBesides, "corection of .* looks like a misspelt correction"),
    (NoSuchName, "name 'torhc' is not defined; see test_forks.py, line"),
    (OtherInit, "takes 2 positional arguments but 5 were given"),
    (FailsLate, "second line; see test_forks.py, line"),
    (NoBatch, r"must return \[B, F\], here \[2, 64\], but it returns \[64\]"),
    (AllTokens, r"must return \[B, F\], here \[2, 64\], but it returns \[2, 9, 64\]"),
    (OneColumn, r"must return \[B, T, F\], here \[2, 9, 64\], but it returns \[2, 9, 1\]"),
    (FewArguments, "takes 2 positional arguments but 5 were given"),
    (OtherRowsCount, "another answer alone than beside a second one"),
    (Uncounted, "leave out the tokens where counted is False"),
    (StatisticOfCATS, "defines statistic, which is GRIFFIN's; CATS never calls it"),
    (Unfinished, "lacks reset, count, select, decode, selection, sparsify"),
    (caprese.SparseFF, "lacks reset")])
def test_a_class_that_cannot_work_is_refused(block, says, device):
    """In one line, before anything is attached; what was attached before stays."""
    model = caprese.attach(tiny.model(device=device), "cats")
    with pytest.raises(ValueError, match=says):
        caprese.attach(model, block)
    assert {type(ff) for ff in caprese.sparse_layers(model).values()} == {caprese.CATS}


def test_a_block_may_gather_by_its_own_and_counted_needs_no_default(device):
    class Own(caprese.SparseFF):
        """Not a GRIFFIN, though it names its methods as one."""
        gathers = True
        statistic, mask = caprese.GRIFFIN.statistic, caprese.GRIFFIN.mask
        reset, count = caprese.GRIFFIN.reset, caprese.GRIFFIN.count

        def select(self):
            self.kept = self.mask(self.s.topk(self.num_kept).indices)

        def selection(self, x, gate, z, counted):
            return self.mask(self.statistic(x, gate, z, counted).topk(self.num_kept).indices)

        def sparsify(self, x, gate, z, kept):
            return z * kept[:, None]

        def merge(self, s, s_G):
            return torch.hypot(s, s_G)

        def gather(self, neurons):
            pass

        def fused(self, x):
            pass

        def decode(self, x):
            return self.sparse(x, *self.neurons(x), self.kept)

    class NoDefault(caprese.GRIFFIN):
        def statistic(self, x, gate, z, counted):
            return super().statistic(x, gate, z, counted)

    for block in (Own, NoDefault):
        caprese.attach(tiny.model(device=device), block)
