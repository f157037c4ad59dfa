"""torchrun and FSDP. Run: python -m pytest tests/test_several_devices.py -m "slow or not slow" """

import os
import re
import sys

import pytest
from test_distill import ROOT, SHORT, run

import caprese
import sample
from beyond import several_devices

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
MODULE = (*TORCHRUN, "-m", "beyond.several_devices")


@pytest.mark.parametrize("words, message", [
    ([], "torchrun"),
    (["--fsdp"], "torchrun"),
    (["--density", "some"], "density"),  # the flags are those of distill.py
    (["--shard"], "--shard"),
    (["--model", "nowhere"], "--data"),
])
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["several_devices.py", *words])
    with pytest.raises(SystemExit) as end:
        sample.run_command(several_devices.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and len(err.splitlines()) == 1


def test_the_flags_are_those_of_distill_and_fsdp(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args, fsdp = several_devices.arguments(["--rank", "8", "--fsdp", "--fresh"])
    assert fsdp and args.rank == 8 and args.fresh and not hasattr(args, "fsdp")
    assert several_devices.arguments([])[1] is False


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("--layerwise", "closed"),
    ("--layerwise", "sequential", "--loss", "kl"),
    ("--layerwise", "closed", "--fsdp", "--loss", "kl"),
    ("--layerwise", "sequential", "--fsdp"),
    ("--layerwise", "adam", "--fsdp", "--gradient-checkpointing"),
], ids=["closed", "sequential-kl", "closed-kl-fsdp", "sequential-fsdp", "adam-fsdp"])
def test_two_processes_learn_what_one_does(tmp_path, words):
    """Over gloo, both stages; an odd number of samples leaves one process an empty batch.

    What Python does at the end of a process is not waited for: gloo's threads may abort it.
    """
    words = ("--samples", "41", "--eval-samples", "2", "--e2e-batch-size", "8", *words)
    alone = [word for word in words if word != "--fsdp"]
    assert run(*alone, "--out", tmp_path / "one").returncode == 0
    abort_late = "import atexit, os\nif 'RANK' in os.environ: atexit.register(os.abort)\n"
    (tmp_path / "sitecustomize.py").write_text(abort_late)  # Python imports it at its start
    done = run(*words, "--out", tmp_path / "two", launcher=MODULE,
               env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Distilling") == done.stdout.count("wrote") == 1  # rank 0 alone
    assert "2 x cpu" in done.stdout
    if "--fsdp" in words:
        assert int(re.search(r"holds (\d+)% of the layers' weights", done.stdout)[1]) < 60
    one, about_one = caprese.load_tensors(tmp_path / "one")
    two, about_two = caprese.load_tensors(tmp_path / "two")
    assert about_one == about_two
    for i in range(3):
        name = f"model.layers.{i}.mlp"
        map_one = one[f"{name}.L"] @ one[f"{name}.R"]  # L and R alone are free up to a sign
        map_two = two[f"{name}.L"] @ two[f"{name}.R"]
        # Adam divides by the size of the gradient, which carries a rounding error to the size of a
        # step where a gradient is close to zero.
        assert (map_one - map_two).norm() < 0.02 * map_one.norm()
    assert not list(tmp_path.glob("*.state"))


FAILING = """
import os, sys
sys.path.insert(0, {root!r})
import distill, sample
from beyond import several_devices

train_end_to_end = distill.train_end_to_end

def fail_on_rank_1(*args, **settings):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no such luck")
    train_end_to_end(*args, **settings)

distill.train_end_to_end = fail_on_rank_1
sample.run_command(several_devices.main)
"""


@pytest.mark.slow
def test_an_error_in_another_rank_is_printed_and_ends_all_and_the_same_command_goes_on(tmp_path):
    """Rank 0 waits for the gradients of rank 1 meanwhile; a run that hung would time out."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT)), encoding="utf-8")
    done = run(*SHORT, "--out", tmp_path / "a", launcher=(*TORCHRUN, str(script)), timeout=120)
    assert done.returncode != 0
    assert "rank 1: RuntimeError: no such luck" in done.stderr
    assert not (tmp_path / "a").exists()
    done = run(*SHORT, "--out", tmp_path / "a", launcher=MODULE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Going on from") == 1
    assert (tmp_path / "a").exists() and not (tmp_path / "a.state").exists()


@pytest.mark.slow
def test_bad_input_of_all_processes_is_said_once(tmp_path):
    done = run("--density", "0", "--out", tmp_path / "a", launcher=MODULE)
    assert done.returncode != 0
    assert len(re.findall(r"density is 0\.0, but", done.stderr)) >= 1
    done = run("--model", "nowhere", launcher=MODULE)
    assert done.stderr.count("--model and --data go together") == 1
    assert list(tmp_path.iterdir()) == []
