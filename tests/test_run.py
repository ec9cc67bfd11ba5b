"""The run: training and resuming, the folder, the flags and the exit codes of siren.py.

What may go wrong, in many more cases, is in test_faults.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import siren
import toy_env

ROOT = Path(siren.__file__).resolve().parent
SMALL = {"prompts": 8, "group_size": 4, "eval_prompts": 4, "eval_samples": 4}


def untimed(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def run(folder, resume=False, **options):
    """The records of a small run, without the field that holds times."""
    cfg = siren.Config(out=str(folder), **{**SMALL, **options})
    return [untimed(record) for record in siren.train(siren.Run(cfg, resume=resume))]


def on_disk(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [untimed(json.loads(line)) for line in lines]


def flags_of(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def command(*flags):
    """The exit code, the output and the lines of the errors, without the progress bar."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = siren.main(list(flags)) or 0
        except SystemExit as stop:
            code = stop.code or 0
    lines = [line for line in err.getvalue().splitlines() if line.strip() and "%|" not in line]
    return code, out.getvalue(), lines


def asked_for(monkeypatch, *flags):
    """(cfg, resume), with which the command line would begin a run."""
    asked = []

    def refuse(cfg, resume):
        asked.append((cfg, resume))
        raise ValueError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(siren, "Run", refuse)
        code, _, lines = command(*flags)
    assert code == 2 and "not today" in lines[0], lines
    return asked[0]


# ----------------------------------------------------------------------- training and resuming


def test_same_seed_same_file_and_other_seed_another(tmp_path):
    one, two = (run(tmp_path / name, steps=3) for name in "ab")
    assert one == two == on_disk(tmp_path / "a") == on_disk(tmp_path / "b")
    assert one[1] != run(tmp_path / "c", steps=1, seed=1)[1]
    fields = "step reward entropy h_agg anchor peak_fraction nucleus_size clip_fraction "
    fields += "approx_kl policy_loss regularizer_loss grad_norm response_tokens ended_share "
    fields += "useless_share easy/avg@4 easy/maj@4 hard/pass@4 hard/distinct@4"
    assert set(fields.split()) <= set(one[-1])
    assert one[1]["anchor"] == one[1]["h_agg"] == one[3]["anchor"]


def test_a_given_anchor_is_kept_over_a_resume(tmp_path):
    records = run(tmp_path, steps=1, anchor=0.75)
    assert records[1]["anchor"] == 0.75 != records[1]["h_agg"]
    records = run(tmp_path, resume=True, steps=2, anchor=0.75)
    assert [record["anchor"] for record in records[1:]] == [0.75, 0.75]


@pytest.mark.parametrize("options", [{}, {"regularizer": "bonus"}, {"algorithm": "grpo"}])
def test_micro_batch_size_does_not_matter(tmp_path, options):
    options = {**options, "steps": 3}
    runs = [run(tmp_path / str(n), micro_batch_size=n, **options) for n in (3, 64)]
    for small, large in zip(*runs, strict=True):
        assert set(small) == set(large)
        for key, value in large.items():
            close = pytest.approx(value, rel=1e-4, abs=1e-4)
            assert small[key] == close, f"{key} at step {small['step']}"


def stop_at(step, monkeypatch, error):
    """Let the training step of this number raise an error."""
    true_step = siren.training_step

    def stopped(run, number):
        if number == step:
            raise error
        return true_step(run, number)

    monkeypatch.setattr(siren, "training_step", stopped)


def test_resumed_run_repeats_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", steps=6, save_every=2)
    stop_at(4, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", steps=6, save_every=2)
    monkeypatch.undo()
    assert [record["step"] for record in on_disk(tmp_path / "cut")] == [0, 1, 2, 3]
    saved = siren.load_checkpoint(tmp_path / "cut")
    assert len(saved["records"]) == 3, "saved after steps 0 and 2"
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rewa')  # killed while writing the line after the checkpoint
    resumed = run(tmp_path / "cut", resume=True, steps=6, save_every=2)
    assert resumed == whole == on_disk(tmp_path / "cut")
    one, two = (siren.load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert set(one["model"]) == set(two["model"]) and len(one["model"]) > 10
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert one["anchor"] == two["anchor"]
    for index, state in one["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][index][key])


def start(script, folder, *flags):
    """A process that trains; it has a checkpoint and some steps when this returns."""
    process = subprocess.Popen(
        [sys.executable, script, f"--out={folder}", *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(script).parent,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    file = Path(folder) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") >= 5):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_an_interrupted_process_goes_on_to_the_same_numbers(tmp_path):
    process = start(ROOT / "siren.py", tmp_path / "cut", *TINY, "--steps=40", "--save-every=3")
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted; --resume" in errors.splitlines()[-1]
    goes_on(ROOT, tmp_path / "cut")


def test_more_steps_go_on_from_the_end(tmp_path):
    long = run(tmp_path / "long", steps=4)
    run(tmp_path / "short", steps=2)
    more = run(tmp_path / "short", resume=True, steps=4)
    tested = {key for key in long[0] if "/" in key}
    assert tested and tested <= set(more[2]), "step 2 was the last once, and was evaluated"
    assert [{k: v for k, v in r.items() if k not in tested} for r in more[1:4]] == [
        {k: v for k, v in r.items() if k not in tested} for r in long[1:4]
    ]
    assert more[4] == long[4]
    assert run(tmp_path / "short", resume=True, steps=4) == more, "nothing is left to do"


def test_what_computes_nothing_may_change_on_resume(tmp_path):
    flags = [*flags_of(SMALL), "--steps=1"]
    assert command(f"--out={tmp_path / 'a'}", *flags)[0] == 0
    (tmp_path / "a").rename(tmp_path / "b")
    changed = ("--save-every=1", "--micro-batch-size=3", "--eval-every=2", "--chunk=50")
    code, _, lines = command(f"--out={tmp_path / 'b'}", "--resume", "--steps=2", *changed)
    assert code == 0, lines
    assert [record["step"] for record in on_disk(tmp_path / "b")] == [0, 1, 2]
    assert siren.load_checkpoint(tmp_path / "b")["config"]["eval_every"] == 2


TEN_STEPS = {"steps": 10, "group_size": 8, "warmup_steps": 2, "eval_samples": 8}


@pytest.mark.slow
def test_ten_steps_raise_the_reward(tmp_path):
    options = {"prompts": 64, "mini_batches": 8, "eval_prompts": 128, "eval_temperature": 1.0}
    plain = run(tmp_path / "plain", regularizer="none", **TEN_STEPS, **options)
    names = ("easy/avg@8", "hard/avg@8")
    gains = [plain[-1][name] - plain[0][name] for name in names]
    assert sum(gains) / 2 > 0.03, f"held-out accuracy changed by {gains}"


def test_ten_steps_move_the_entropy(tmp_path):
    """H_agg is pulled to the anchor from both sides."""
    options = TEN_STEPS | {"prompts": 16, "lr": 1e-3, "eval_prompts": 4, "mini_batches": 4}
    plain = run(tmp_path / "base", regularizer="none", **options)
    up = run(tmp_path / "up", anchor=2.5, beta=1.0, **options)
    down = run(tmp_path / "down", anchor=1e-6, beta=1.0, **options)
    first = plain[1]["h_agg"]
    assert down[-1]["h_agg"] < plain[-1]["h_agg"] < up[-1]["h_agg"]
    assert up[-1]["h_agg"] > first + 0.1 and down[-1]["h_agg"] < first - 0.1


def test_five_to_seven_terms_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the base model of this world is kept
    world = "toy_env:min_terms=5,max_terms=7,base_steps=40"
    records = run(tmp_path, task=world, steps=2, max_tokens=18)
    assert all(math.isfinite(r["grad_norm"]) and r["entropy"] > 0 for r in records[1:])


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    true_loss = siren.siren_loss
    calls = []

    def once_nan(*args, **kwargs):
        loss, stats = true_loss(*args, **kwargs)
        calls.append(1)
        return loss * (math.nan if len(calls) == 15 else 1.0), stats  # in the fourth step

    monkeypatch.setattr(siren, "siren_loss", once_nan)
    flags = [f"--out={tmp_path}", *flags_of(SMALL), "--save-every=2"]
    code, _, lines = command(*flags, "--steps=6")
    assert code == 1 and len(lines) == 1 and "non-finite" in lines[0]
    saved = siren.load_checkpoint(tmp_path)
    assert len(saved["records"]) == 3 and len(on_disk(tmp_path)) == 4
    assert all(value.isfinite().all() for value in saved["model"].values())
    monkeypatch.undo()
    again = run(tmp_path, resume=True, steps=6, save_every=2)
    assert [record["step"] for record in again] == list(range(7)), "it gets another try"


def test_diverging_weights_stop_with_one_line(tmp_path):
    flags = ["--lr=1e6", "--steps=30", "--warmup-steps=0", "--weight-decay=1", "--prompts=8"]
    code, _, lines = command(*flags, f"--out={tmp_path}", "--eval-prompts=4")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("siren.py: ") and "non-finite" in lines[0]


# ---------------------------------------------------------------------------------- the folder


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    run(tmp_path, steps=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, lines = command(f"--out={tmp_path}", "--steps=1")
    assert code == 2 and "holds a run; add --resume" in lines[-1]
    code, _, lines = command(f"--out={tmp_path}", "--resume", "--beta=0.5")
    assert code == 2 and "--beta was 0.2; omit it" in lines[-1]
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "metrics.jsonl").unlink()  # the checkpoint is the run
    code, _, lines = command(f"--out={tmp_path}", "--steps=1")
    assert code == 2 and "holds a run" in lines[-1]


def test_a_checkpoint_is_of_the_data_and_the_frozen_weights_that_the_task_has(
    tmp_path, monkeypatch
):
    """A task may have a fingerprint of what the checkpoint does not hold."""
    monkeypatch.setattr(toy_env.ToyWorld, "fingerprint", "one", raising=False)
    run(tmp_path, steps=1)
    assert run(tmp_path, resume=True, steps=2)[-1]["step"] == 2
    monkeypatch.setattr(toy_env.ToyWorld, "fingerprint", "another")
    code, _, lines = command("--resume", f"--out={tmp_path}", "--steps=3")
    assert code == 2 and len(lines) == 1 and "is not that of the run" in lines[0]


def test_bad_input_found_late_leaves_the_folder_free(tmp_path):
    flags = [f"--out={tmp_path}", "--prompts=8", "--steps=0"]
    assert command(*flags, "--eval-prompts=100000")[0] == 2
    code, _, lines = command(*flags, "--eval-prompts=4")
    assert code == 0, lines


def test_a_process_that_trains_keeps_others_out(tmp_path):
    process = start(ROOT / "siren.py", tmp_path, *flags_of(SMALL), "--steps=1000")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for flags in ([], ["--resume"]):
        code, _, lines = command(f"--out={tmp_path}", *flags)
        assert code == 2 and len(lines) == 1, lines
        assert str(tmp_path) in lines[0] and "another process" in lines[0]
    assert process.poll() is None, "it goes on"
    process.kill()
    process.communicate()
    records = siren.load_checkpoint(tmp_path)["records"]
    assert before and run(tmp_path, resume=True, steps=len(records))[-1]["step"] == len(
        records
    )


@pytest.mark.parametrize("failing", ["save", "replace"])
def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, failing):
    run(tmp_path, steps=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    true_save = torch.save

    def full(state, path):
        true_save(state, path)
        os.truncate(path, 1000)
        raise OSError(28, "No space left on device")

    def no_replace(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "save":
            patch.setattr(torch, "save", full)
        else:
            patch.setattr(Path, "replace", no_replace)
        code, _, lines = command(f"--out={tmp_path}", "--resume", "--steps=2")
    assert code == 1 and len(lines) == 1 and "No space left" in lines[0]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    run(tmp_path, resume=True, steps=2)
    assert len(siren.load_checkpoint(tmp_path)["records"]) == 3
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory\nat all"),
        OSError(28, "full"),
        RuntimeError("of torch\n\nin lines"),
    ],
)
def test_what_stops_a_run_is_one_line(tmp_path, monkeypatch, error):
    stop_at(1, monkeypatch, error)
    code, _, lines = command(f"--out={tmp_path}", "--steps=1", "--eval-prompts=4")
    assert code == 1 and len(lines) == 1, lines
    assert lines[0].startswith("siren.py: ") and " ".join(str(error).split()) in lines[0]


def test_ctrl_c_is_one_line_and_130(tmp_path, monkeypatch):
    stop_at(1, monkeypatch, KeyboardInterrupt())
    code, _, lines = command(f"--out={tmp_path}", "--steps=1", "--eval-prompts=4")
    assert code == 130 and len(lines) == 1 and "interrupted; --resume" in lines[0]


def test_a_run_of_no_steps_is_its_first_evaluation(tmp_path):
    assert [record["step"] for record in run(tmp_path, steps=0)] == [0]
    saved = siren.load_checkpoint(tmp_path)
    assert len(saved["records"]) == 1 and not saved["optimizer"]["state"]
    assert [record["step"] for record in run(tmp_path, resume=True, steps=1)] == [0, 1]


# ----------------------------------------------------------------------------------- the flags


def test_the_table(tmp_path):
    code, out, _ = command(f"--out={tmp_path}", *flags_of(SMALL), "--steps=12")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    records = on_disk(tmp_path)
    assert code == 0
    for name in ("reward", "entropy", "h_agg", "anchor"):
        last_ten = [record[name] for record in records[3:]]
        expected = [f"{records[1][name]:.3f}", f"{sum(last_ten) / 10:.3f}"]
        assert rows[name].split() == expected
    ends = [f"{records[i]['hard/pass@4']:.3f}" for i in (0, -1)]
    assert rows["hard/pass@4"].split() == ends
    assert "step" not in rows


def test_a_run_that_learns_nothing_says_so(tmp_path):
    """With one token no response can end: every reward is 0. It is said after ten steps, and
    at the end; a run that learns says nothing of the kind."""
    flags = flags_of({**SMALL, "save_every": 99, "eval_prompts": 1})
    code, out, lines = command(
        f"--out={tmp_path / 'a'}", "--max-tokens=1", "--steps=11", *flags
    )
    told = " ".join(lines)
    assert code == 0 and told.count("no signal for ten steps") == 1
    assert out.count("no signal for ten steps") == 1 and "\\boxed{}" in told
    assert all(record["mixed_groups"] == 0 for record in on_disk(tmp_path / "a")[1:])
    code, out, lines = command(f"--out={tmp_path / 'b'}", "--steps=11", *flags)
    assert code == 0 and "no signal" not in out + " ".join(lines)
    assert 0 < on_disk(tmp_path / "b")[-1]["mixed_groups"] <= 1


def test_mixed_groups_are_those_with_right_and_wrong_responses(tmp_path):
    """By hand from the rewards: 0 exactly when no group could teach anything."""
    records = run(tmp_path, steps=4, prompts=2, mini_batches=1)
    for record in records[1:]:
        right = round(record["reward"] * 2 * SMALL["group_size"])
        possible = {0: {0.0}, 8: {0.0}, 4: {0.0, 1.0}}.get(right, {0.5, 1.0})
        assert record["mixed_groups"] in possible


def test_a_reader_that_leaves_early_is_no_failure(tmp_path):
    """siren.py | true, although the table has nowhere to go."""
    words = [sys.executable, str(ROOT / "siren.py"), "--steps=0", f"--out={tmp_path}"]
    words += flags_of({**SMALL, "eval_prompts": 1})
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0 and "Error" not in errors
    assert len(on_disk(tmp_path)) == 1


def test_a_fifo_in_the_place_of_the_log_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert run(tmp_path, steps=0, eval_prompts=1) == on_disk(tmp_path)
    assert (tmp_path / "metrics.jsonl").is_file()


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        siren.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    comments = (ROOT / "siren.py").read_text().splitlines()
    assert done.value.code in (0, None)
    for field in dataclasses.fields(siren.Config):
        line = next(line for line in comments if line.startswith(f"    {field.name}: "))
        about = line.partition("  # ")[2]
        assert len(about) > 3, f"{field.name} has no comment"
        assert f"--{field.name.replace('_', '-')}" in text and " ".join(line.split()) in text
    assert "--resume" in text


def test_flags_of_the_task(monkeypatch):
    cfg, resume = asked_for(
        monkeypatch, "--vocab", "1024", "--gap-share=0.3", "--lr=0.5", "--seed=3"
    )
    assert cfg.task == "toy_env:vocab=1024,gap_share=0.3" and not resume
    assert (cfg.seed, cfg.lr) == (3, 0.5)
    cfg, _ = asked_for(monkeypatch, "--task=toy_env:seed=4", "--vocab=300")
    assert cfg.task == "toy_env:seed=4,vocab=300" and cfg.seed == 0
    cfg, _ = asked_for(monkeypatch, "--model", "some/model", "--data=a.jsonl", "--steps=9")
    assert cfg.task == "text_env:model=some/model,data=a.jsonl" and cfg.steps == 9
    cfg, _ = asked_for(monkeypatch)
    assert cfg == siren.Config()


def test_options_of_the_task_arrive_as_they_were_written(tmp_path, monkeypatch):
    """With spaces, commas and signs of equality in them."""
    given = []

    def load(cfg, **options):
        given.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(toy_env, "load", load)
    for flags, expected in (
        (["--vocab=300", "--split", "test"], {"vocab": "300", "split": "test"}),
        (["--prompt", "Think, then answer:"], {"prompt": "Think, then answer:"}),
        (["--prompt=a = b, c", "--vocab=3"], {"prompt": "a = b, c", "vocab": "3"}),
        (["--low", "-1"], {"low": "-1"}),
        (["--prompt", "--x=y {question}"], {"prompt": "--x=y {question}"}),
        (["--vocab=64", "--vocab", "96"], {"vocab": "96"}),
        (["--task", "toy_env:vocab=300,split=test"], {"vocab": "300", "split": "test"}),
        (["--prompt", "{question},split=test"], {"prompt": "{question},split=test"}),
        (["--vocab=300,slip=0"], {"vocab": "300,slip=0"}),  # a value sets no other flag
        (["--task", "toy_env:prompt=1+1"], {"prompt": "1+1"}),
        (["--prompt", "1 + 1"], {"prompt": "1 + 1"}),
        (["--prompt", "50% + é & ü\n=\\box{}"], {"prompt": "50% + é & ü\n=\\box{}"}),
    ):
        code, _, lines = command(f"--out={tmp_path}", *flags)
        assert code == 2 and "enough" in lines[0], lines
        assert given.pop() == expected


@pytest.mark.parametrize(
    "flags, word",
    [
        (["vocab", "300"], "vocab"),
        (["--vocab=300", "slip", ".1"], "slip"),
        (["--vocab", "300", ".1"], ".1"),
        (["--vocab"], "--vocab"),
        (["--vocab", "--slip", ".1"], ".1"),
    ],
)
def test_what_is_no_flag_with_a_value_is_refused(tmp_path, flags, word):
    code, _, lines = command(f"--out={tmp_path / 'run'}", *flags)
    assert code == 2 and len(lines) == 1 and f" {word}: is no flag with a value" in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_group_of_one_is_refused_before_there_is_a_folder(tmp_path):
    code, _, lines = command(f"--out={tmp_path / 'run'}", "--group-size=1")
    assert code == 2 and "--group-size 1: must be at least 2" in lines[0]
    assert not (tmp_path / "run").exists()


def test_an_anchor_of_0_is_an_anchor(tmp_path, monkeypatch):
    """H_agg of the first step may be exactly 0: the second step must not set another one."""
    values = iter([torch.tensor(0.0), torch.tensor(0.7), torch.tensor(0.7)])
    monkeypatch.setattr(siren, "aggregate_entropy", lambda *what: next(values))
    monkeypatch.setattr(siren, "update", lambda *what: {"grad_norm": 0.0})
    assert run(tmp_path, steps=1)[1]["anchor"] == 0.0
    records = run(tmp_path, resume=True, steps=3)
    assert [record["anchor"] for record in records[1:]] == [0.0, 0.0, 0.0]


def test_resume_takes_its_flags_from_the_run(tmp_path, monkeypatch):
    task = "toy_env:split=validation"
    run(tmp_path, steps=1, beta=0.4, task=task)
    cfg, resume = asked_for(monkeypatch, "--resume", f"--out={tmp_path}")
    assert resume and (cfg.beta, cfg.steps, cfg.task, cfg.prompts) == (0.4, 1, task, 8)
    cfg, _ = asked_for(monkeypatch, "--resume", f"--out={tmp_path}", "--steps=7")
    assert cfg.steps == 7 and Path(cfg.out) == tmp_path
    tmp_path.rename(tmp_path.with_name("moved"))
    cfg, _ = asked_for(monkeypatch, "--resume", f"--out={tmp_path.with_name('moved')}")
    assert cfg.out.endswith("moved") and cfg.beta == 0.4
    monkeypatch.chdir(tmp_path.parent)
    shutil.copytree("moved", "runs/none-seed5")  # a folder's default name
    cfg, _ = asked_for(monkeypatch, "--resume", "--regularizer=none", "--seed=5")
    assert siren.folder_of(cfg) == Path("runs/none-seed5")


def test_the_limit_of_a_setting_is_that_of_its_field():
    """A whole number, such as 0, may be given for one that is not."""
    for settings, limit in (
        ({"lr": 0}, "1e-12"),
        ({"top_p": 2}, "1e-12"),
        ({"prompts": 0}, 1),
    ):
        [(name, value)] = settings.items()
        flag = f"--{name.replace('_', '-')} {value}"
        with pytest.raises(ValueError, match=f"{flag}: must be {limit} to "):
            siren.Config(**settings)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        siren.Config().lr = 1.0


# ------------------------------------------------------------------------------- alone at home


TINY = ["--prompts=4", "--group-size=4", "--mini-batches=2"]
TINY += ["--eval-prompts=2", "--eval-samples=2"]


@pytest.fixture
def alone(tmp_path):
    """A folder with siren.py, toy_env.py and assets/, and nothing else of the project."""
    for name in ("siren.py", "toy_env.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    return tmp_path


def python(*words, cwd):
    """A process that can import nothing of this repository but what is in its folder."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=bare,
        timeout=300,
    )


@pytest.mark.slow
def test_it_trains_in_an_empty_folder(alone):
    done = python("siren.py", "--steps=3", cwd=alone)
    assert done.returncode == 0, done.stderr
    assert len(on_disk(alone / "runs" / "anchor-seed0")) == 4 and "hard/pass@16" in done.stdout


def goes_on(home, cut):
    """A run that was stopped early ends, by --resume, as one that was not."""
    steps = 8
    if len(siren.load_checkpoint(cut)["records"]) > 8:
        steps = 40  # the machine was so slow to stop it
    done = python("siren.py", "--resume", f"--out={cut}", f"--steps={steps}", cwd=home)
    assert done.returncode == 0 and "h_agg" in done.stdout, done.stderr
    whole = cut.with_name("whole")
    assert command(f"--out={whole}", *TINY, f"--steps={steps}")[0] == 0
    assert on_disk(cut) == on_disk(whole)
    one, two = (siren.load_checkpoint(folder)["model"] for folder in (cut, whole))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
def test_killed_in_an_empty_folder_it_goes_on_to_the_same_numbers(alone):
    process = start(alone / "siren.py", alone / "cut", *TINY, "--steps=40", "--save-every=2")
    process.kill()
    errors = process.communicate()[1]
    assert process.returncode == -9 and "Traceback" not in errors
    goes_on(alone, alone / "cut")


@pytest.mark.slow
def test_without_assets_it_teaches_a_base_model_and_keeps_it(alone):
    shutil.rmtree(alone / "assets")
    done = python("siren.py", "--base-steps=20", *TINY, "--steps=1", cwd=alone)
    assert done.returncode == 0 and "teaching the base model" in done.stderr, done.stderr
    (kept,) = (alone / "runs").glob("toy_base_*")
    assert kept.stat().st_size > 100_000 and len(on_disk(alone / "runs/anchor-seed0")) == 2


@pytest.mark.parametrize("option", [pytest.param("-P", marks=pytest.mark.slow), "-I"])
def test_it_finds_its_task_without_its_folder_on_the_path(alone, option):
    done = python(option, "siren.py", *TINY, "--steps=0", cwd=alone)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_from_another_working_directory(alone):
    (alone / "elsewhere").mkdir()
    done = python("../siren.py", *TINY, "--steps=0", cwd=alone / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert (alone / "elsewhere" / "runs" / "anchor-seed0" / "metrics.jsonl").exists()
