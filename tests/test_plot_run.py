"""examples/plot_run.py: a picture from a run folder, and one line for anything else."""

import json

from examples import plot_run


def record(step):
    values = {"reward": 0.1 * step, "h_agg": 1.0, "entropy": 0.5, "anchor": 1.2}
    return {"step": step, **(values if step else {}), "hard/pass@4": 0.5}


def test_it_draws_runs_side_by_side(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [json.dumps(record(step)) for step in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    folders = [str(tmp_path / name) for name in ("one", "two")]
    assert plot_run.main(folders) == 0
    assert (tmp_path / "one" / "curves.png").stat().st_size > 5_000
    figure = plot_run.draw({name: plot_run.read(tmp_path / name) for name in ("one", "two")})
    reward, h_agg, _, score = figure.axes
    assert [list(line.get_ydata()) for line in reward.lines] == [[0.1, 0.2], [0.1, 0.2]]
    assert len(h_agg.lines) == 4 and score.get_title() == "hard/pass@4"
    assert "wrote" in capsys.readouterr().out


def test_what_is_not_a_run_is_one_line(tmp_path, capsys):
    for content in (None, "", "no json"):
        if content is not None:
            (tmp_path / "metrics.jsonl").write_text(content)
        assert plot_run.main([str(tmp_path)]) == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert len(shown) == 1 and "name" in shown[0] and "run" in shown[0]
