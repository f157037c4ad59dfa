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


class Merg(caprese.GRIFFIN):
    def merg(self, s, s_G):
        return s + s_G


class FirstRow(caprese.GRIFFIN):
    def sparsify(self, x, gate, z, kept):
        return z * kept[:1, None]


class LocalState(caprese.GRIFFIN):
    """The scale of a row's prompt, which decoding takes up, is not in row_state."""
    def count(self, x, gate, z, counted):
        super().count(x, gate, z, counted)
        self.scale = self.s.mean(dim=1)[:, None, None]

    def selection(self, x, gate, z, counted):
        self.scale = self.statistic(x, gate, z, counted).mean(dim=1)[:, None, None]
        return super().selection(x, gate, z, counted)

    def sparsify(self, x, gate, z, kept):
        return z * kept[:, None] * self.scale


class OtherFull(caprese.GRIFFIN):
    def neurons(self, x):
        gate, z = super().neurons(x)
        return gate, 2 * z


class NoCorrectionInSparse(caprese.GRIFFIN):
    def sparse(self, x, gate, z, kept):
        return 2 * self.down_proj(self.sparsify(x, gate, z, kept))


class SparsePrompt(caprese.GRIFFIN):
    def teacher_forced(self, x, generated):
        gate, z = self.neurons(x)
        return self.sparse(x, gate, z, self.selection(x, gate, z, ~generated))


class CountsPadding(caprese.GRIFFIN):
    def count(self, x, gate, z, counted):
        super().count(x, gate, z, None)


class ChangesWhileDecoding(caprese.GRIFFIN):
    gathers = False

    def decode(self, x):
        out = super().decode(x)
        self.kept = ~self.kept
        return out


class Inside(caprese.GRIFFIN):
    def new_adapter(self, rank):
        super().new_adapter(rank)
        self.inside = torch.nn.Linear(32, 32, bias=False)


class CannotLoad(caprese.GRIFFIN):
    def new_adapter(self, rank):
        super().new_adapter(rank)
        self.b = torch.nn.Parameter(torch.zeros(self.gate_proj.in_features))

    def correction(self, x):
        return super().correction(x) + self.b.to(x.dtype)


class ThresholdOfGRIFFIN(caprese.GRIFFIN):
    def threshold(self, gate, counted=None):
        return gate.amax(dim=(1, 2))


class OwnValueError(caprese.GRIFFIN):
    def statistic(self, x, gate, z, counted=None):
        B, T = z.shape


class NoReturn(caprese.GRIFFIN):
    def statistic(self, x, gate, z, counted=None):
        z.abs().sum(1)


class Unfinished(caprese.SparseFF):
    pass


@pytest.mark.parametrize("block, says", [
    (OtherTraining, "would learn another function than it decodes by"),
    (OnlyFused, "brings a gather or a fused that does not compute"),
    (OneRow, "another answer alone than beside a second one"),
    (FirstRow, "another answer alone than beside a second one"),
    (LocalState, "row_state must name every tensor"),
    (OtherFull, "changes the full model"),
    (NoCorrectionInSparse, "would fit L and R of .* to another residual"),
    (SparsePrompt, "would learn another function than it decodes by"),
    (CountsPadding, "the padding of a shorter prompt changes its answer"),
    (ChangesWhileDecoding, "another answer after the row beside it has ended"),
    (Inside, "has parameters in modules of its own, inside.weight"),
    (CannotLoad, "its set_adapter does not take b, as|its set_adapter does not take L, R, b as"),
    (ThresholdOfGRIFFIN, "defines threshold, which is CATS's; GRIFFIN never calls it"),
    (OwnValueError, "too many values to unpack .*; see test_forks.py, line .*B, T = z.shape"),
    (NoReturn, r"must return \[B, F\], here \[2, 64\], but it returns None"),
    (NoMerge, "does not merge as GRIFFIN's does"),
    (BadMerge, "no attribute 'no_such_thing'; see test_forks.py, line .*no_such_thing"),
    (Misspelt, "statistics of .* looks like a misspelt statistic"),
    (MisspeltInBetween, "statistics of .* looks like a misspelt statistic"),
    (MisspeltBesides, "corection of .* looks like a misspelt correction"),
    (NoSuchName, "name 'torhc' is not defined; see test_forks.py, line"),
    (OtherInit, r"__init__ of .* must take \(self, mlp, density, rank, call\).* line \d+"),
    (Merg, "merg of .* looks like a misspelt merge"),
    (FailsLate, "second line; see test_forks.py, line"),
    (NoBatch, r"must return \[B, F\], here \[2, 64\], but it returns \[64\]"),
    (AllTokens, r"must return \[B, F\], here \[2, 64\], but it returns \[2, 9, 64\]"),
    (OneColumn, r"must return \[B, T, F\], here \[2, 9, 64\], but it returns \[2, 9, 1\]"),
    (FewArguments, r"must take \(self, x, gate, z, counted\).*: test_forks.py, line \d+"),
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
        row_state = ("s", "kept")
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


def test_a_class_that_changes_nothing_is_named(device, capsys):
    class Same(caprese.GRIFFIN):
        sparsity = 0.5  # no method, so it is no misspelt sparsify

    caprese.attach(tiny.model(device=device), Same)
    assert "Same changes nothing of GRIFFIN" in capsys.readouterr().err

    class OtherLayers(caprese.GRIFFIN):
        @staticmethod
        def default_layers(num_layers):
            return range(1)

    for method in (OtherLayers, "griffin", "cats"):
        caprese.attach(tiny.model(device=device), method)
    assert capsys.readouterr().err == ""


def test_a_correction_may_compute_in_float32_and_have_other_shapes(device, capsys):
    class InFloat32(caprese.GRIFFIN):
        def correction(self, x):
            return (x.float() @ self.L @ self.R).to(x.dtype)

    class Gated(caprese.GRIFFIN):
        """L has a gate for each of its r columns, so neither path of GRIFFIN fits it."""
        def new_adapter(self, rank):
            super().new_adapter(rank)
            self.L = torch.nn.Parameter(torch.cat([self.L.detach(), self.L.detach()], dim=1))

        def set_adapter(self, L, R):
            self.L, self.R = torch.nn.Parameter(L.clone()), torch.nn.Parameter(R.clone())

        def correction(self, x):
            up, gate = (x @ self.L.to(x.dtype)).chunk(2, dim=-1)
            return (up * gate.sigmoid()) @ self.R.to(x.dtype)

    model = caprese.attach(tiny.model(device=device), InFloat32, rank=4)
    ff = next(iter(caprese.sparse_layers(model).values()))
    assert ff.gathers and caprese.has_closed_form(ff) and capsys.readouterr().err == ""
    model = caprese.attach(tiny.model(device=device), Gated, rank=4)
    ff = next(iter(caprese.sparse_layers(model).values()))
    assert not ff.gathers and not caprese.has_closed_form(ff)
    assert "takes the masked path" in capsys.readouterr().err


def test_what_may_be_meant_is_said(device, capsys):
    class Forgets(caprese.GRIFFIN):
        def merge(self, s, s_G):
            return 0.5 * s + s_G

    class NeverCalled(caprese.GRIFFIN):
        def compute_score(self, z):
            return z.abs().sum(1)

        def merge(self, s, s_G):
            return self.merges(s, s_G)  # a helper may have a name like a method's

        def merges(self, s, s_G):
            return torch.hypot(s, s_G)

    caprese.attach(tiny.model(device=device), Forgets)
    assert "merge of test_forks:" in capsys.readouterr().err
    caprese.attach(tiny.model(device=device), NeverCalled)
    said = capsys.readouterr().err
    assert "compute_score of" in said and "nothing here calls" in said and "merge" not in said
