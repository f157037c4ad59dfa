"""Tries a sparse method of your own before it is attached: a class that cannot work is refused.

caprese.attach calls check() for every class, also for GRIFFIN and CATS, which an editor may have
changed in place. Without this file a wrong class runs, or fails, as it is. What holds in any case:
decoding takes gathered neurons only where that computes what the class says (caprese.may_gather).
"""

import traceback
from difflib import get_close_matches
from pathlib import Path

import torch

import caprese
from caprese import CATS, GRIFFIN, SparseFF


@torch.no_grad()
def check(block, act_fn):
    """Try a tiny block of a class, in float64: two prompts of 8 tokens and one more token each.

    Raises ValueError, in one line, if a method is missing, seems misspelt, fails, returns another
    shape, or does not agree with the others.
    """
    name = caprese.method_name(block)
    check_names(block, name)
    try:
        ff = caprese.tiny_block(block, act_fn)
        x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        check_shapes(ff, x, name)
        check_rows(ff, x, name)
        check_merge(ff, x, name)
        check_paths(ff, name)
    except ValueError:
        raise
    except Exception as error:  # the class may fail in any way that Python can
        raise ValueError(f"{name} fails on a tiny block, with B = 2, T = 9, D = 32 and F = 64: "
                         f"{' '.join(str(error).split())}; {own_line(error)}") from error


def check_names(block, name):
    """ValueError if a class lacks a method, or defines one that looks like a misspelt one."""
    needed = ["reset", "count", "select", "decode"]
    if block.teacher_forced is SparseFF.teacher_forced:
        needed += ["selection", "sparsify"]
    missing = [method for method in needed if not hasattr(block, method)]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}, which SparseFF asks for")
    bases = [base for base in block.__mro__ if base.__module__ == caprese.__name__]
    known = {method for base in [GRIFFIN, *bases] for method in dir(base)}
    own = [method for base in block.__mro__ if base not in bases and base is not object
           for method in vars(base) if not method.startswith("_")]
    for method in own:
        if issubclass(block, CATS) and hasattr(GRIFFIN, method) and not hasattr(CATS, method):
            raise ValueError(f"{name} defines {method}, which is GRIFFIN's; CATS never calls it")
        similar = get_close_matches(method, known, n=1, cutoff=0.85)
        if similar and method not in known:
            raise ValueError(f"{method} of {name} looks like a misspelt {similar[0]}; rename it")


def check_shapes(ff, x, name):
    """ValueError if statistic or sparsify of a GRIFFIN returns a tensor of another shape."""
    if not isinstance(ff, GRIFFIN):
        return
    gate, z = ff.neurons(x)
    s = ff.statistic(x, gate, z, None)
    if s.shape != (2, 64):
        raise ValueError(f"statistic of {name} must return [B, F], here [2, 64], but it returns "
                         f"{list(s.shape)}")
    kept_z = ff.sparsify(x, gate, z, ff.selection(x, gate, z, None))
    if kept_z.shape != z.shape:
        raise ValueError(f"sparsify of {name} must return [B, T, F], here [2, 9, 64], but it "
                         f"returns {list(kept_z.shape)}")


def check_rows(ff, x, name):
    """ValueError if a row has another answer alone, beside a second one, or by teacher forcing."""
    alone = caprese.decode_last(ff, x[:1], gathers=False)
    beside = caprese.decode_last(ff, x, gathers=False)
    forced = ff.teacher_forced(x, torch.arange(9).expand(2, -1) == 8)[:, -1:]
    if not torch.allclose(alone, beside[:1]):
        raise ValueError(f"{name} gives a prompt another answer alone than beside a second one; "
                         "each row of a batch must be treated by itself")
    if not torch.allclose(forced, beside):
        raise ValueError(f"{name} would learn another function than it decodes by: its "
                         "teacher_forced does not compute what its count, select and decode do; "
                         "does it leave out the tokens where counted is False?")


def check_merge(ff, x, name):
    """ValueError if a reselection fails, or if GRIFFIN's merge does not fit the statistic."""
    ff.reset()
    for part in (x[:, :4], x[:, 4:]):
        ff.count(part, *ff.neurons(part), None)
        ff.select()
    if getattr(type(ff), "merge", None) is not GRIFFIN.merge:
        return
    whole, first, rest = (ff.statistic(part, *ff.neurons(part), None)
                          for part in (x, x[:, :4], x[:, 4:]))
    if not torch.allclose(ff.merge(first, rest), whole):
        raise ValueError(f"the statistic of {name} does not merge as GRIFFIN's does: for it, sqrt("
                         "s^2 + s_G^2) of two parts is not that of the whole; write merge as well")


def check_paths(ff, name):
    """ValueError if a gather or fused of its own does not compute what the masked path does."""
    block = type(ff)
    if not block.gathers or (block.gather, block.fused) == (GRIFFIN.gather, GRIFFIN.fused):
        return
    if not caprese.paths_agree(ff):
        raise ValueError(f"{name} brings a gather or a fused that does not compute what its "
                         "sparsify and correction do")


def own_line(error):
    """Where an error came from, outside of torch."""
    torch_folder = str(Path(torch.__file__).parent)
    own = [frame for frame in traceback.extract_tb(error.__traceback__)
           if not frame.filename.startswith(torch_folder)]
    return f"see {Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line}"
