"""Training, resuming and the command line: siren.train, siren.main and examples/engine.py."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import siren
from examples import engine
from examples.engine import load_checkpoint, read_flags

ROOT = Path(siren.__file__).resolve().parent
SMALL = {"prompts": 8, "group_size": 4, "eval_prompts": 4, "eval_samples": 4}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models are faster so, and numbers repeat."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def untimed(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def run(folder, resume=False, **options):
    """The records of a small run, without the field that holds times."""
    cfg = siren.Config(out=str(folder), **{**SMALL, **options})
    return [untimed(record) for record in siren.train(cfg, resume=resume)]


def on_disk(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [untimed(json.loads(line)) for line in lines]


def flags_of(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def command(*flags):
    """The exit code, the output and the lines of the errors."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = siren.main(list(flags))
    return code, out.getvalue(), [line for line in err.getvalue().splitlines() if line.strip()]


# ------------------------------------------------------------------------ training and resuming


def test_same_seed_same_file_and_other_seed_another(tmp_path):
    one, two = (run(tmp_path / name, steps=3) for name in "ab")
    assert one == two == on_disk(tmp_path / "a") == on_disk(tmp_path / "b")
    assert one[1] != run(tmp_path / "c", steps=1, seed=1)[1]
    fields = "step reward entropy h_agg anchor peak_fraction nucleus_size clip_fraction approx_kl "
    fields += "policy_loss regularizer_loss grad_norm response_tokens ended_share skipped_updates "
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


def test_resumed_run_repeats_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", steps=6, save_every=2)
    true_step = siren.training_step

    def stopped(model, optimizer, task, cfg, step, last):
        if step == 4:
            raise KeyboardInterrupt
        return true_step(model, optimizer, task, cfg, step, last)

    monkeypatch.setattr(siren, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", steps=6, save_every=2)
    monkeypatch.undo()
    assert [record["step"] for record in on_disk(tmp_path / "cut")] == [0, 1, 2, 3]
    assert len(load_checkpoint(tmp_path / "cut")["records"]) == 3, "saved after steps 0 and 2"
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rewa')  # killed while writing the line after the checkpoint
    resumed = run(tmp_path / "cut", resume=True, steps=6, save_every=2)
    assert resumed == whole == on_disk(tmp_path / "cut")
    one, two = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert set(one["model"]) == set(two["model"]) and len(one["model"]) > 10
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    for index, state in one["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][index][key])


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_stopped_process_resumes_with_the_same_numbers(tmp_path, how):
    cut = tmp_path / "cut"
    first = [f"--out={cut}", *flags_of(SMALL), "--steps=40", "--save-every=3"]
    process = subprocess.Popen(
        [sys.executable, "siren.py", *first],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also in the background
    )
    deadline, file = time.monotonic() + 120, cut / "metrics.jsonl"
    while not (file.exists() and file.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == (-9 if how == "kill" else 130)
    assert how == "kill" or f"--resume --out {cut}" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    again = [sys.executable, "siren.py", "--resume", f"--out={cut}", "--steps=8"]
    if len(load_checkpoint(cut)["records"]) > 8:
        again[-1] = "--steps=40"  # the machine was so slow to send the signal
    steps = int(again[-1].partition("=")[2])
    done = subprocess.run(again, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "h_agg / anchor" in done.stdout, done.stderr[-500:]
    assert on_disk(cut) == run(tmp_path / "whole", steps=steps, save_every=3)


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


def test_what_computes_nothing_may_change_on_resume_and_is_said(tmp_path):
    flags = [*flags_of(SMALL), "--steps=1"]
    assert command(f"--out={tmp_path / 'a'}", *flags)[0] == 0
    (tmp_path / "a").rename(tmp_path / "b")
    changed = ("--save-every=1", "--micro-batch-size=3", "--eval-every=2")
    code, _, lines = command(f"--out={tmp_path / 'b'}", "--resume", "--steps=2", *changed)
    assert code == 0
    said = [line for line in lines if "resuming with" in line]
    assert said == [
        "siren.py: resuming with --steps 2; it was 1",
        "siren.py: resuming with --micro-batch-size 3; it was 64",
        "siren.py: resuming with --eval-every 2; it was 0",
        "siren.py: resuming with --save-every 1; it was 10",
    ]
    assert [record["step"] for record in on_disk(tmp_path / "b")] == [0, 1, 2]


def test_ten_steps_raise_the_reward_and_move_the_entropy(tmp_path):
    """H_agg is pulled to the anchor from both sides; without a regulariser the reward rises."""
    options = {"steps": 10, "prompts": 64, "group_size": 8, "mini_batches": 8, "warmup_steps": 2}
    options |= {"eval_prompts": 128, "eval_samples": 8, "eval_temperature": 1.0}
    plain = run(tmp_path / "plain", regularizer="none", **options)
    gains = [plain[-1][f"{name}/avg@8"] - plain[0][f"{name}/avg@8"] for name in ("easy", "hard")]
    assert sum(gains) / 2 > 0.03, f"held-out accuracy changed by {gains}"
    options |= {"prompts": 16, "lr": 1e-3, "eval_prompts": 4, "mini_batches": 4}
    plain = run(tmp_path / "base", regularizer="none", **options)
    up = run(tmp_path / "up", anchor=2.5, beta=1.0, **options)
    down = run(tmp_path / "down", anchor=0.0, beta=1.0, **options)
    start = plain[1]["h_agg"]
    assert down[-1]["h_agg"] < plain[-1]["h_agg"] < up[-1]["h_agg"]
    assert up[-1]["h_agg"] > start + 0.1 and down[-1]["h_agg"] < start - 0.1


def test_five_to_seven_terms_train(tmp_path):
    world = "toy_env:min_terms=5,max_terms=7,base_steps=40"
    records = run(tmp_path, task=world, steps=2, max_tokens=18)
    assert all(math.isfinite(r["grad_norm"]) and r["entropy"] > 0 for r in records[1:])


def test_non_finite_gradients_are_skipped_then_stop_the_run(tmp_path, monkeypatch):
    true_loss, calls, bad = siren.siren_loss, [], {2, 3}

    def sometimes_nan(*args, **kwargs):
        loss, stats = true_loss(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) in bad else loss), stats

    monkeypatch.setattr(siren, "siren_loss", sometimes_nan)
    records = run(tmp_path / "two", steps=2)
    assert [r.get("skipped_updates") for r in records] == [None, 2, 0]
    assert math.isfinite(records[1]["grad_norm"])
    bad |= set(range(len(calls) + 9, 10**5))  # two whole steps of four updates, then none
    with pytest.raises(FloatingPointError, match="not finite"):
        run(tmp_path / "all", steps=9, save_every=2)
    saved = load_checkpoint(tmp_path / "all")
    assert len(saved["records"]) == 3 and all(v.isfinite().all() for v in saved["model"].values())
    bad.clear()
    again = run(tmp_path / "all", resume=True, steps=4, save_every=2)
    assert [r["skipped_updates"] for r in again[3:]] == [0, 0], "it gets another try"


def test_diverging_weights_stop_with_one_line(tmp_path):
    flags = ["--lr=1e6", "--steps=30", "--warmup-steps=0", "--weight-decay=1", "--prompts=8"]
    code, _, lines = command(*flags, f"--out={tmp_path}", "--eval-prompts=4")
    assert code == 1
    assert "not finite" in lines[-1] and "lower --lr" in lines[-1] and "Traceback" not in lines[-1]


# ------------------------------------------------------------------------------ the command line

BAD_FLAGS = """
--lr=-1            | --lr -1.0: must be 1e-12 to 1000000
--lr=inf           | --lr inf: must be
--lr=fast          | invalid float value: 'fast'
--top-p=0          | --top-p 0.0: must be 1e-06 to 1
--top-p=1.5        | --top-p 1.5: must be 1e-06 to 1
--group-size=1     | --group-size 1: must be 2 to 10000
--beta=nan         | --beta nan: must be
--regularizer=kl   | --regularizer kl: must be anchor or bonus or none
--mini-batches=99  | --mini-batches 99: must be at most --prompts
--steps=1.5        | invalid int value: '1.5'
--learning-rate=1  | learning_rate='1': no such option
--device=tpu9      | --device tpu9:
--task=nowhere     | --task nowhere:
--task=toy_env:x=1 | no such option
--task=toy_env:gap | --task toy_env:gap:
--task=json        | --task json:
--task=.here       | --task .here:
--task=math        | --task math:
--lora-rank=2      | lora_rank='2': no such option
--recompute=1      | recompute='1': no such option
--recompute        | --recompute: has no value
--threads=99999    | --threads 99999: must be 0 to 1024
--eval-prompts=1000000 | the number of easy test prompts
--max-tokens=400   | must fit the model's 256 tokens
--out=/proc/none   | --out /proc/none: can't be written
"""


@pytest.mark.parametrize("line", BAD_FLAGS.strip().splitlines())
def test_bad_flag_is_one_clear_line(tmp_path, line):
    flag, message = (part.strip() for part in line.split("|", 1))
    code, out, lines = command(f"--out={tmp_path}", flag)
    assert code == 2 and not out
    assert len(lines) == 1 and lines[0].startswith("siren.py: error: "), lines
    assert message in lines[0]


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    run(tmp_path, steps=1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    code, _, lines = command(f"--out={tmp_path}", "--steps=1")
    assert code == 2 and "already holds a run; add --resume" in lines[-1]
    code, _, lines = command(f"--out={tmp_path}", "--resume", "--beta=0.5")
    assert code == 2 and "--beta was 0.2, not 0.5" in lines[-1]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    (tmp_path / "metrics.jsonl").unlink()  # the checkpoint alone is a run, too
    code, _, lines = command(f"--out={tmp_path}", "--steps=1")
    assert code == 2 and "already holds a run" in lines[-1]


def test_bad_input_found_late_leaves_the_folder_free(tmp_path):
    flags = [f"--out={tmp_path}", "--prompts=8", "--steps=0", "--eval-prompts=4"]
    assert command(*flags, "--max-tokens=400")[0] == 2
    code, _, lines = command(*flags)
    assert code == 0, lines


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory\nat all"), OSError(28, "full")]
)
def test_a_full_machine_is_one_line(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(siren, "training_step", fail)
    code, _, lines = command(f"--out={tmp_path}", "--steps=1", "--eval-prompts=4")
    assert code == 1
    assert lines[-1].startswith("siren.py: stopped: ") and str(error).splitlines()[0] in lines[-1]


def test_another_runtime_error_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(siren, "training_step", fail)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        command(f"--out={tmp_path}", "--steps=1", *flags_of(SMALL))


def test_a_run_of_no_steps_is_its_first_evaluation(tmp_path):
    assert [record["step"] for record in run(tmp_path, steps=0)] == [0]
    saved = load_checkpoint(tmp_path)
    assert len(saved["records"]) == 1 and not saved["optimizer"]["state"]
    assert [record["step"] for record in run(tmp_path, resume=True, steps=1)] == [0, 1]


def test_the_table_and_where_every_step_is(tmp_path):
    code, out, _ = command(f"--out={tmp_path}", *flags_of(SMALL), "--steps=12")
    lines, records = out.splitlines(), on_disk(tmp_path)
    assert code == 0 and lines[-1] == f"every step: {tmp_path / 'metrics.jsonl'}"
    last_ten = [record["h_agg"] / record["anchor"] for record in records[3:]]
    expected = ["h_agg / anchor", "1.000", f"{sum(last_ten) / 10:.3f}"]
    assert re.split(r"\s{2,}", next(line for line in lines if "/ anchor" in line)) == expected
    expected = ["hard/pass@4", *(f"{records[i]['hard/pass@4']:.3f}" for i in (0, -1))]
    assert re.split(r"\s{2,}", next(line for line in lines if "hard/pass" in line)) == expected


def test_help_documents_every_knob_and_the_options_of_the_task(capsys):
    with pytest.raises(SystemExit) as done:
        siren.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    for field in dataclasses.fields(siren.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["doc"] and f"default: {field.default}" in text
    import toy_env

    assert set(toy_env.OPTIONS) >= {f.name for f in dataclasses.fields(toy_env.ToyWorld)}
    for name, about in toy_env.OPTIONS.items():
        assert name.replace("_", "-") in text or name in text
        assert name in vars(siren.Config()) or about in text


def test_flags_of_the_task():
    cfg, resume = read_flags(["--vocab", "1024", "--gap-share=0.3", "--seed=3"])
    assert cfg.task == "toy_env:vocab=1024,gap_share=0.3" and cfg.seed == 3 and not resume
    cfg, _ = read_flags(["--task=toy_env:seed=4", "--vocab=300"])
    assert cfg.task == "toy_env:seed=4,vocab=300" and cfg.seed == 0
    cfg, _ = read_flags(["--model", "some/model"])
    assert cfg.task == "examples.text_env:model=some/model"
    assert siren.load_task(siren.Config(task="toy_env:seed=4,vocab=300")).vocab == 300


def test_resume_takes_its_flags_from_the_run(tmp_path):
    task = "toy_env:split=validation"
    run(tmp_path, steps=1, beta=0.4, task=task)
    cfg, resume = read_flags(["--resume", f"--out={tmp_path}"])
    assert resume and (cfg.beta, cfg.steps, cfg.task, cfg.prompts) == (0.4, 1, task, 8)
    assert read_flags(["--resume", f"--out={tmp_path}", "--steps=7"])[0].steps == 7


def test_plug_replaces_functions_of_siren(tmp_path, monkeypatch):
    source = "import siren\ntrue, count = siren.sample, []\n"
    source += (
        "def sample(*args, **options):\n    count.append(1)\n    return true(*args, **options)"
    )
    source += "\ndef plug():\n    siren.sample = sample\n"
    (tmp_path / "my_sampler.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(siren, "sample", siren.sample)  # put back after the test
    flags = [f"--out={tmp_path / 'run'}", *flags_of(SMALL), "--steps=1", "--plug=my_sampler"]
    assert command(*flags)[0] == 0
    assert len(sys.modules["my_sampler"].count) == 5, "two sets before, a step, two sets after"


def test_nothing_to_learn_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(siren, "verify", lambda *_, **__: False)
    flags = [f"--out={tmp_path}", *flags_of(SMALL), "--steps=6", "--max-tokens=2"]
    code, _, lines = command(*flags)
    assert code == 0
    assert sum("was wrong, so there is nothing to learn" in line for line in lines) == 1
    assert sum("ended within --max-tokens; raise it" in line for line in lines) == 1


def test_import_runs_nothing_and_config_is_frozen():
    code = "import siren, sys; print([m in sys.modules for m in "
    code += "('transformers', 'toy_env', 'examples.engine')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[False, False, False]" and not done.stderr
    with pytest.raises(dataclasses.FrozenInstanceError):
        siren.Config().lr = 1.0


def test_write_whole_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    engine.write_whole(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine.os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            engine.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [path.name]
    engine.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------ the documents


def test_readme_names_functions_and_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "`" in line]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row.rsplit("|", 2)[-2])}
    assert len(names & set(dir(siren))) >= 10
    for name in names:
        assert callable(getattr(siren, name, None)), f"README names {name}"
    flags = {flag.strip("-") for flag in re.findall(r"--[a-z][a-z-]+", text)}
    known = {f.name.replace("_", "-") for f in dataclasses.fields(siren.Config)}
    known |= {"resume", "help"}
    import toy_env

    known |= {name.replace("_", "-") for name in toy_env.OPTIONS}
    others = {"rebuild-base", "check-base", "preset", "no-deps", "impl", "rounds"}
    others |= {"model", "data", "eval-data", "lora-rank", "tried"}
    assert flags <= known | others, f"unknown flags {flags - known - others}"


def test_a_run_without_rewards_says_so_again_after_a_better_spell(tmp_path, capsys):
    """Five steps without any reward are one line, at whatever step they come."""
    records = [{"step": 0}]
    with engine.RunFolder(siren.Config(out=str(tmp_path)), resume=False) as folder:
        for step, reward in enumerate([0.0] * 6 + [0.1] + [0.0] * 6, 1):
            records.append({"step": step, "reward": reward, "ended_share": 1.0})
            folder.log(records)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["step 5", "step 12"]
    assert all("was wrong" in line for line in lines)
