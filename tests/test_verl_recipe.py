"""The recipe of docs/verl.md, run against stand-ins for verl's functions."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import siren

PAGE = Path(__file__).resolve().parents[1] / "docs" / "verl.md"


class Data(dict):
    """What verl gives its losses, as far as the recipe uses it."""

    def select(self, name):
        return SimpleNamespace(to_padded_tensor=lambda: {name: self[name]})


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The module, imported among stand-ins: (module, verl's functions, group of calls)."""
    calls = []
    plain = SimpleNamespace(ppo_loss=lambda config, model_output, data, group: (0.0, {}))
    functional = SimpleNamespace(entropy_from_logits=None)
    padding = SimpleNamespace(no_padding_2_padding=lambda h, data: h)
    modules = {"verl.utils": SimpleNamespace(torch_functional=functional)}
    modules |= {
        "verl.workers": SimpleNamespace(engine_workers=plain),
        "verl": SimpleNamespace(),
    }
    modules |= {"verl.workers.utils.padding": padding}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: calls.append(group))
    (code,) = (block.split("```")[0] for block in PAGE.read_text().split("```python\n")[1:])
    assert code.startswith("# siren_verl.py")
    (tmp_path / "siren_verl.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "siren_verl", raising=False)
    monkeypatch.delenv("SIREN_ANCHOR", raising=False)
    yield importlib.import_module("siren_verl"), plain, functional, calls
    sys.modules.pop("siren_verl", None)


def test_the_recipe_on_stand_ins(recipe):
    """Loss and gradient are those of siren.siren_loss, in the parts that verl would add up."""
    module, plain, functional, calls = recipe
    module.known["anchor"] = 0.3
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 9, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[6], [3], [5], [1]])
    data = Data(response_mask=mask, global_batch_size=4, dp_size=1)
    entropy = functional.entropy_from_logits(logits)
    loss, metrics = plain.ppo_loss(None, {"entropy": entropy}, data, dp_group="all")
    (found,) = torch.autograd.grad(loss, logits)

    h = siren.token_stats(logits, torch.zeros(4, 6, dtype=torch.long))["nucleus_entropy"]
    nothing = torch.zeros((), dtype=torch.float64)  # in the place of a policy loss
    expected, stats = siren.siren_loss(nothing, h, mask, 0.3, beta=0.005)
    (gradient,) = torch.autograd.grad(expected, logits)
    assert calls == ["all"] and gradient.abs().max() > 1e-6
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-15)
    assert metrics["siren/h_agg"] == pytest.approx(float(stats["h_agg"]))
    assert metrics["siren/regularizer_loss"] == pytest.approx(float(stats["regularizer_loss"]))

    data["dp_size"], data["global_batch_size"] = 2, 8  # half of the mini-batch, on one of two
    loss, _ = plain.ppo_loss(None, {"entropy": functional.entropy_from_logits(logits)}, data)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], found)


def test_many_rows_are_taken_in_parts(recipe):
    """With more than 256 rows, H' and its gradient are those of all rows at once."""
    _, _, functional, _ = recipe
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 7, 9, generator=g, dtype=torch.float64, requires_grad=True)
    found = functional.entropy_from_logits(logits)
    tokens = torch.zeros(100, 7, dtype=torch.long)
    due = siren.token_stats(logits, tokens)["nucleus_entropy"]
    assert found.shape == (100, 7) and torch.equal(found, due)
    weights = torch.randn(100, 7, generator=g, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * h).sum(), logits)[0] for h in (found, due)]
    torch.testing.assert_close(*gradients)


def test_the_first_mini_batch_is_the_anchor(recipe):
    _, plain, functional, _ = recipe
    data = Data(response_mask=torch.ones(2, 3), global_batch_size=2, dp_size=1)
    entropy = functional.entropy_from_logits(torch.arange(24.0).view(2, 3, 4).cos())
    loss, metrics = plain.ppo_loss(None, {"entropy": entropy}, data)
    assert float(loss) == pytest.approx(0, abs=1e-12) and metrics["siren/h_agg"] > 0.1
    moved, later = plain.ppo_loss(None, {"entropy": entropy / 2}, data)
    gap = metrics["siren/h_agg"] / 2
    assert later["siren/regularizer_loss"] == pytest.approx(0.005 * gap**2, rel=1e-5)
    assert float(moved) == pytest.approx(0.005 * gap**2, rel=1e-5)
