"""examples/gpu_check.py in small: what it writes, its exit code, and that it finds faults."""

import json
import math

import pytest
import torch

import siren
from examples import gpu_check

TIMES = {
    "stats, siren / plain: time",
    "stats, siren / trl: time",
    "siren.sample / generate: time",
}
OTHERS = {
    f"{what} in {name}: relative error"
    for what in ("loss", "gradient")
    for name in gpu_check.ERRORS
}
OTHERS |= {
    "stats, siren / plain: memory",
    "stats, siren / trl: memory",
    "sampled - scored logp, nats",
}
OTHERS |= {"metrics not finite", "an update / its plan: working memory"}
OTHERS |= {"seconds in all"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The whole command in small -> exit code, what it wrote, the tokens of both samplers."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    sampled = []
    race = gpu_check.race

    def watched(name, ours, other, high):
        if "generate" in name:
            sampled.append((ours().tokens, other()))
        return race(name, ours, other, high)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "race", watched)
        code = gpu_check.main(["--small", "--out", str(out)])
    return code, json.loads(out.read_text()), *sampled


def test_what_is_written(small):
    code, written, _ = small
    assert set(written) == {"passed", "small", "machine", "versions", "checks"}
    assert written["small"] is True and written["machine"]
    assert {"torch", "transformers", "trl"} <= set(written["versions"])
    rows = {row["check"]: row for row in written["checks"]}
    assert set(rows) == TIMES | OTHERS
    for row in rows.values():
        assert set(row) - {"seconds"} == {"check", "result", "value", "low", "high", "note"}
        inside = row["low"] <= row["value"] <= row["high"]
        assert row["result"] == ("pass" if inside else "FAIL")
    assert code == (0 if written["passed"] else 1)


def test_everything_passes_but_for_the_speed_of_a_busy_machine(small):
    _, written, _ = small
    failed = {row["check"] for row in written["checks"] if row["result"] != "pass"}
    assert failed <= TIMES
    assert written["passed"] is (not failed)
    for row in written["checks"]:
        if row["check"] in TIMES:
            ours, other = row["seconds"]
            assert row["value"] == ours / other > 0
    step = next(row for row in written["checks"] if row["check"].startswith("metrics"))
    assert step["seconds"] > 0


def test_both_samplers_make_the_same_number_of_tokens(small):
    ours, other = small[2]
    size = gpu_check.SMALL
    assert ours.shape == (8 * size.prompts, size.response)
    assert other.shape == (8 * size.prompts, size.prompt + size.response)


def wrong_square(policy, entropy, mask, anchor, beta, **options):
    loss, stats = REAL["siren_loss"](policy, entropy, mask, anchor, 1.001 * beta, **options)
    return loss, stats


def no_clipping(*args):
    return REAL["policy_loss"](*args, clip_low=1.0, clip_high=9.0)


def all_tokens_are_peaks(entropy, mask, quantile):
    return mask


def whole_vocabulary(log_pi, top_p):
    return log_pi


REAL = {"siren_loss": siren.siren_loss, "policy_loss": siren.policy_loss}
FAULTS = {"siren_loss": wrong_square, "policy_loss": no_clipping}
FAULTS |= {"peak_mask": all_tokens_are_peaks, "nucleus": whole_vocabulary}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_loss_is_a_failure(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(siren, name, FAULTS[name])
    for other in ("check_stats", "check_run"):
        monkeypatch.setattr(gpu_check, other, lambda s: [])
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--small", "--out", str(out)]) == 1
    written = json.loads(out.read_text())
    results = {row["check"]: row["result"] for row in written["checks"]}
    assert written["passed"] is False
    for dtype in gpu_check.ERRORS:
        assert results[f"loss in {dtype}: relative error"] == "FAIL"
    assert capsys.readouterr().out.count("FAIL") == [*results.values()].count("FAIL")


def test_a_wrong_gradient_is_a_failure(monkeypatch):
    """The loss is right, but nothing flows back through the entropies."""

    def cut(policy, entropy, *args, **options):
        return REAL["siren_loss"](policy, entropy.detach(), *args, **options)

    monkeypatch.setattr(siren, "siren_loss", cut)
    results = {row["check"]: row["result"] for row in gpu_check.check_loss(gpu_check.SMALL)}
    for dtype in gpu_check.ERRORS:
        assert results[f"loss in {dtype}: relative error"] == "pass"
        assert results[f"gradient in {dtype}: relative error"] == "FAIL"


def test_a_part_that_stops_is_a_failure_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def check_stats(s):
        yield gpu_check.judge("before", 1, 0, 2)
        raise torch.OutOfMemoryError("out of memory\nat line 3")

    monkeypatch.setattr(gpu_check, "check_loss", lambda s: [])
    monkeypatch.setattr(gpu_check, "check_stats", check_stats)
    monkeypatch.setattr(gpu_check, "check_run", lambda s: [gpu_check.judge("after", 1, 0, 2)])
    assert gpu_check.main(["--small", "--out", str(tmp_path / "gpu.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["before", "check_stats", "after", "seconds"]
    assert "FAIL" in lines[1] and "out of memory" in lines[1]


def test_without_trl_its_row_says_so_and_is_no_failure(monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_check, "race", lambda name, *_: gpu_check.judge(name, 1, 0, 2))
    monkeypatch.setattr(gpu_check, "peak_of", lambda way: 1)
    *_, last = gpu_check.check_stats(gpu_check.SMALL)
    assert last == {
        "check": "stats, siren / trl",
        "result": "-",
        "note": "trl is not installed",
    }
    for other in ("check_loss", "check_run"):
        monkeypatch.setattr(gpu_check, other, lambda s: [])
    monkeypatch.setattr(gpu_check, "check_stats", lambda s: [last])
    assert gpu_check.main(["--small"]) == 0


@pytest.mark.parametrize(("value", "result"), [(1, "pass"), (3, "FAIL"), (math.nan, "FAIL")])
def test_a_number_that_is_none_fails(value, result):
    assert gpu_check.judge("", value, 0, 2)["result"] == result


def test_peaks_are_those_of_the_allocator():
    there = torch.ones(5 << 20, dtype=torch.uint8, device=gpu_check.DEVICE)

    def run():
        x = torch.ones(3 << 20, dtype=torch.uint8, device=gpu_check.DEVICE)
        del x
        torch.ones(2 << 20, dtype=torch.uint8, device=gpu_check.DEVICE)

    assert gpu_check.peak_of(run) == pytest.approx(3 << 20, rel=1e-3)
    assert len(there) == 5 << 20


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ([], "no GPU is here; add --small"),
        (["--small", "--out", "."], "--out .: must be a file in a folder that exists"),
        (["--small", "--out", "no/such/gpu.json"], "must be a file in a folder that exists"),
        (["--tiny"], "--tiny"),
    ],
)
def test_bad_input_is_one_line(flags, fault, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert fault in error and "\n" not in error
