"""Tries a sparse method of your own before it is attached: a class that cannot work is refused.

caprese.attach calls check() for every class, also for GRIFFIN and CATS, which an editor may have
changed in place. Without this file a wrong class runs, or fails, as it is. What holds in any case:
decoding takes gathered neurons only where that computes what the class says (caprese.may_gather).
"""

import inspect
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path

import torch

import caprese
from caprese import CATS, GRIFFIN, SparseFF

PROMPT = 7  # of the 9 tokens that are tried
PASSED = set()  # classes with their functions, for check() takes 30 ms
NEVER_CALLED = [(GRIFFIN, "CATS", {"threshold"}),
                (CATS, "GRIFFIN", {"statistic", "merge", "top_neurons"})]


class Refused(ValueError):
    """Why a class cannot work, in one line."""


@torch.no_grad()
def check(block, act_fn):
    """Try a tiny block of a class, in float64: two prompts of 7 tokens and two more tokens each.

    Raises Refused, a ValueError in one line, if a method is missing, seems misspelt, fails, returns
    another shape, or does not agree with the others.
    """
    functions = (block, act_fn, *(value for base in block.__mro__ for value in vars(base).values()
                                  if inspect.isfunction(value)))
    if functions in PASSED:
        return
    name = caprese.method_name(block)
    check_names(block, name)
    try:
        caprese.tiny_block(block, act_fn, rank=0)  # as load_adapter begins
        ff = caprese.tiny_block(block, act_fn)
        x = caprese.tiny_input(2, 9)
        check_full(ff, x, name)
        check_shapes(ff, x, name)
        check_rows(ff, x, name)
        check_counted(ff, x, name)
        check_teacher_forced(ff, x, name)
        check_merge(ff, x, name)
        check_paths(ff, x, name)
        check_parameters(ff, name)
        check_residual(ff, x, name)
    except Refused:
        raise
    except Exception as error:  # the class may fail in any way that Python can
        raise Refused(f"{name} fails on a tiny block, with B = 2, T = 9, D = 32 and F = 64: "
                      f"{' '.join(str(error).split())}; {own_line(error)}") from error
    PASSED.add(functions)


def check_names(block, name):
    """Refused if a class lacks a method, or defines one that is misspelt, or called otherwise.

    Notes on stderr say what it defines and nothing calls, and that it changes nothing.
    """
    needed = ["reset", "count", "select", "decode"]
    changed = block.teacher_forced is not SparseFF.teacher_forced
    if not (changed and block.residual is not SparseFF.residual):
        needed += ["selection", "sparsify"]
    missing = [method for method in needed if not hasattr(block, method)]
    if missing:
        raise Refused(f"{name} lacks {', '.join(missing)}, which SparseFF asks for")
    bases = [base for base in block.__mro__ if base.__module__ == caprese.__name__]
    known = {method for base in [GRIFFIN, *bases] for method in dir(base)}
    own = {method: value for base in block.__mro__ if base not in (*bases, *SparseFF.__mro__)
           for method, value in vars(base).items() if inspect.isfunction(value)}
    for base, other, methods in NEVER_CALLED:
        for method in methods & own.keys():
            if issubclass(block, base):
                raise Refused(f"{name} defines {method}, which is {other}'s; {base.__name__} never "
                              "calls it")
    called = {word for function in own.values() for word in function.__code__.co_names}
    for method in own.keys() - known - called:
        similar = get_close_matches(method, known, n=1, cutoff=0.85)
        if similar:
            raise Refused(f"{method} of {name} looks like a misspelt {similar[0]}; rename it")
        print(f"note: {method} of {name} is a method that nothing here calls", file=sys.stderr)
    for method in own.keys() & known - {"set_adapter"}:  # whose parameters are the class's own
        check_signature(own[method], getattr(bases[0], method, None), name)
    attributes = {attribute for base in block.__mro__ if base not in (*bases, *SparseFF.__mro__)
                  for attribute in vars(base) if attribute[:2] != "__"}
    if block is not bases[0] and not (own.keys() | attributes) & known:
        print(f"note: {name} changes nothing of {bases[0].__name__}", file=sys.stderr)


def check_signature(method, original, name):
    """Refused if a method cannot be called as the one that it replaces."""
    if not inspect.isfunction(original):
        return
    parameters = inspect.signature(original).parameters
    try:
        inspect.signature(method).bind(*parameters)
    except TypeError:
        raise Refused(f"{method.__name__} of {name} must take ({', '.join(parameters)}), in this "
                      f"order: {Path(method.__code__.co_filename).name}, line "
                      f"{method.__code__.co_firstlineno}") from None


def close(a, b):
    """Are two outputs equal? A correction may compute in float32."""
    return torch.allclose(a, b, **caprese.CLOSE)


def check_full(ff, x, name):
    """Refused if a call in the phase full is not the original FF."""
    full = ff.down_proj(ff.act_fn(ff.gate_proj(x)) * ff.up_proj(x))
    if not close(ff(x), full):
        raise Refused(f"{name} changes the full model, from which L and R learn: in the phase full "
                      "it does not compute FF(x); change sparsify or sparse, not neurons")


def check_shapes(ff, x, name):
    """Refused if statistic or sparsify of a GRIFFIN returns something of another shape."""
    if not isinstance(ff, GRIFFIN):
        return
    gate, z = ff.neurons(x)
    s = ff.statistic(x, gate, z, None)
    if getattr(s, "shape", None) != (2, 64):
        raise Refused(f"statistic of {name} must return [B, F], here [2, 64], but it returns "
                      f"{shape_of(s)}")
    kept_z = ff.sparsify(x, gate, z, ff.selection(x, gate, z, None))
    if getattr(kept_z, "shape", None) != z.shape:
        raise Refused(f"sparsify of {name} must return [B, T, F], here [2, 9, 64], but it returns "
                      f"{shape_of(kept_z)}")


def shape_of(value):
    """The shape of a tensor as a list, or what else it is."""
    return list(value.shape) if isinstance(value, torch.Tensor) else repr(value)


def check_rows(ff, x, name):
    """Refused if a row has another answer alone than beside another, or after a reorder."""
    both = caprese.decode_rest(ff, x, PROMPT, gathers=False)
    ff.reorder(torch.tensor([1]))
    left = ff.decode(x[1:, -1:])  # the first row has ended
    alone = torch.cat([caprese.decode_rest(ff, row[None], PROMPT, gathers=False) for row in x])
    if not close(alone, both):
        raise Refused(f"{name} gives a prompt another answer alone than beside a second one; "
                      "each row of a batch must be treated by itself")
    if not close(left, both[1:, -1:]):
        raise Refused(f"{name} gives a row another answer after the row beside it has ended; "
                      "row_state must name every tensor that has an entry for each row")


def check_teacher_forced(ff, x, name):
    """Refused if teacher forcing does not compute what prefill, selection and decoding do."""
    decoded = caprese.decode_rest(ff, x, PROMPT, gathers=False)
    forced = ff.teacher_forced(x, generated(x))
    if not close(forced, torch.cat([ff.down_proj(ff.neurons(x)[1])[:, :PROMPT], decoded], dim=1)):
        raise Refused(f"{name} would learn another function than it decodes by: its teacher_forced "
                      "does not compute what its count, select and decode do; does it leave out "
                      "the tokens where counted is False?")


def generated(x):
    """bool [B, T]: the tokens after the prompt."""
    return torch.arange(x.shape[1], device="cpu").expand(len(x), -1) >= PROMPT


def check_counted(ff, x, name):
    """Refused if count() does not leave out the tokens where counted is False: here padding."""
    length = 5
    counted = torch.arange(PROMPT, device="cpu") < torch.tensor([[PROMPT], [length]])
    prompts, new = x[:, :PROMPT], x[:, PROMPT:]
    ff.reset()
    ff.count(prompts, *ff.neurons(prompts), counted)
    ff.select()
    padded = torch.cat([ff.decode(token) for token in new.split(1, dim=1)], dim=1)
    short = torch.cat([prompts[1:, :length], new[1:]], dim=1)
    if not close(padded[1:], caprese.decode_rest(ff, short, length, gathers=False)):
        raise Refused(f"{name} does not leave out the tokens where counted is False: the padding "
                      "of a shorter prompt changes its answer")


def check_merge(ff, x, name):
    """Refused if a reselection fails, or if GRIFFIN's merge does not fit the statistic.

    A merge of its own that does not fit may be meant, to forget old tokens; a note says it.
    """
    ff.reset()
    for part in (x[:, :4], x[:, 4:]):
        ff.count(part, *ff.neurons(part), None)
        ff.select()
    if not isinstance(ff, GRIFFIN):
        return
    whole, first, rest = (ff.statistic(part, *ff.neurons(part), None)
                          for part in (x, x[:, :4], x[:, 4:]))
    if close(ff.merge(first, rest), whole):
        return
    if type(ff).merge is GRIFFIN.merge:
        raise Refused(f"the statistic of {name} does not merge as GRIFFIN's does: for it, sqrt("
                      "s^2 + s_G^2) of two parts is not that of the whole; write merge as well")
    print(f"note: merge of {name} does not make the statistic of a whole from those of two parts; "
          "after a reselection other neurons are kept than a prefill would keep", file=sys.stderr)


def check_paths(ff, x, name):
    """Refused if a gather or fused of its own does not compute what the masked path does."""
    block = type(ff)
    if not block.gathers or (block.gather, block.fused) == (GRIFFIN.gather, GRIFFIN.fused):
        return
    caprese.decode_rest(ff, x[:1], PROMPT, gathers=True)  # what fails says why
    if not caprese.paths_agree(ff):
        raise Refused(f"{name} brings a gather or a fused that does not compute what its "
                      "sparsify and correction do")


def check_parameters(ff, name):
    """Refused if what the correction has learned could not be saved, or not be loaded."""
    learned = {key: value.detach() for key, value in ff.adapter_parameters().items()}
    base = {f"{matrix}_proj.weight" for matrix in ("gate", "up", "down")}
    inside = sorted(dict(ff.named_parameters()).keys() - learned.keys() - base)
    if inside:
        raise Refused(f"{name} has parameters in modules of its own, {', '.join(inside)}, which "
                      "would neither be learned nor saved; make them parameters of the block")
    try:
        ff.set_adapter(**learned)
    except (TypeError, ValueError, KeyError) as error:
        raise Refused(f"an adapter of {name} could not be loaded: its set_adapter does not take "
                      f"{', '.join(learned)} as they are ({error}); write set_adapter "
                      "as well") from None


def check_residual(ff, x, name):
    """Refused if the residual that (7) fits is not what teacher forcing leaves out of FF(x).

    Tried without a correction; one that is not zero for parameters of zero is not tried.
    """
    ff = caprese.tiny_block(type(ff), ff.act_fn)
    for parameter in ff.adapter_parameters().values():
        parameter.zero_()
    if ff.correction(x).any():
        return
    left_out = ff.down_proj(ff.neurons(x)[1]) - ff.teacher_forced(x, generated(x))
    if not close(ff.residual(x, generated(x))[generated(x)], left_out[generated(x)]):
        raise Refused(f"(7) would fit L and R of {name} to another residual than FF(x) minus its "
                      "sparse FF; write residual as well")


def own_line(error):
    """Where an error came from, outside of torch."""
    torch_folder = str(Path(torch.__file__).parent)
    own = [frame for frame in traceback.extract_tb(error.__traceback__)
           if not frame.filename.startswith(torch_folder)]
    return f"see {Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line}"
