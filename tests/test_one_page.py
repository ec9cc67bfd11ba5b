"""examples/one_page.py: each of its functions against siren.py's, and the whole of it."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import siren
from examples import one_page

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "one_page.py"
B, T, V = 40, 5, 8
TAU = 0.8  # with five positions, the peaks of one_page.py
SEEDS = range(6)


def random_logits(seed, dtype=torch.float64):
    """[B, T, V] of rows between flat and sure, and tokens; some rows have ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, dtype=torch.float64, generator=generator)
    logits *= torch.logspace(-3, 2, B, dtype=torch.float64)[:, None, None]
    logits[:4] = logits[:4].round()
    tokens = torch.randint(V, (B, T), generator=generator)
    return logits.to(dtype).requires_grad_(), tokens


def gradient(value, of):
    (found,) = torch.autograd.grad(value, of, retain_graph=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_nucleus_entropy(seed, dtype):
    logits, tokens = random_logits(seed, dtype)
    entropy = one_page.nucleus_entropy(logits.softmax(-1))
    due = siren.token_stats(logits, tokens, one_page.P)["nucleus_entropy"]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(entropy, due, **close)
    weights = torch.randn(B, T, generator=torch.Generator().manual_seed(1)).to(dtype)
    of_due = gradient((weights * due).sum(), logits)
    torch.testing.assert_close(gradient((weights * entropy).sum(), logits), of_due, **close)


@pytest.mark.parametrize("seed", SEEDS)
def test_peaks_and_aggregate_entropy(seed):
    """Ties between positions are left out: siren.py takes all of them, one_page.py one."""
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(B, T, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.ones(B, T, dtype=torch.bool)
    peak = siren.peak_mask(entropy, mask, TAU)
    due = siren.aggregate_entropy(entropy, peak, mask)
    found = one_page.aggregate_entropy(entropy)
    torch.testing.assert_close(found, due)
    of_found = gradient(found, entropy)
    torch.testing.assert_close(of_found, gradient(due, entropy))
    assert torch.equal(of_found > 0, peak)  # the gradient shows where the peaks are
    tied = one_page.aggregate_entropy(torch.tensor([[2.0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]))
    assert tied == 1


def train_with_siren(regularizer, beta):
    """one_page.train, written again with the functions of siren.py."""
    torch.manual_seed(0)
    table = torch.zeros(one_page.V + 1, one_page.V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    mask = torch.ones(one_page.B, one_page.T, dtype=torch.bool)
    anchor = None
    for _ in range(200):
        columns = [torch.full((one_page.B,), one_page.V)]
        for _ in range(one_page.T):
            columns.append(table[columns[-1]].softmax(-1).multinomial(1)[:, 0])
        tokens = torch.stack(columns[1:], 1)
        falls = [any(a > b for a, b in pairwise(ids)) for ids in tokens.tolist()]
        rewards = 1.0 - torch.tensor(falls).to(torch.get_default_dtype())
        adv = siren.group_advantages(rewards, one_page.B)
        now = siren.token_stats(table[torch.stack(columns[:-1], 1)], tokens, one_page.P)
        logp, h = now["logp"], now["nucleus_entropy"]
        policy, _ = siren.policy_loss(logp, logp.detach(), adv, mask, one_page.T)
        how = {"peak_quantile": TAU, "regularizer": regularizer}
        if anchor is None:
            _, stats = siren.siren_loss(policy, h, mask, 0.0, 0.0, **how)
            anchor = stats["h_agg"].item()
        loss, stats = siren.siren_loss(policy, h, mask, anchor, beta, **how)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        different = len(set(map(tuple, tokens.tolist())))
        yield rewards.mean().item(), different


def line_of(beta, reward, different):
    text = f"beta {beta}   reward {reward:.3f}   different responses: {different:3} of "
    return f"{text}{one_page.B}"


@pytest.mark.parametrize(("regularizer", "beta"), [("anchor", 0.3), ("none", 0.0)])
def test_a_run_with_the_functions_of_siren_prints_the_same(regularizer, beta, capsys):
    """In float64, so that no rounding error ever changes what is sampled."""
    torch.set_default_dtype(torch.float64)
    try:
        one_page.train(beta)
        *_, due = train_with_siren(regularizer, beta)
    finally:
        torch.set_default_dtype(torch.float32)
    assert capsys.readouterr().out.splitlines() == [line_of(beta, *due)]


def test_the_command_and_what_its_docstring_promises(tmp_path):
    """Another machine may print other digits."""
    number = re.compile(r"\d+\.?\d*")
    lines = [line for line in one_page.__doc__.splitlines() if "   beta 0." in line]
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for due, line in zip(lines, done.stdout.splitlines(), strict=True):
        beta, _, different, of = map(float, number.findall(due))
        found = [float(x) for x in number.findall(line)]
        assert found[0] == beta and found[3] == of == one_page.B and found[1] > 0.98
        assert found[2] < 90 if beta == 0 else found[2] > 110
        assert (different < 90) == (beta == 0)
    assert not list(tmp_path.iterdir())


def test_it_is_one_page_and_needs_nothing_but_torch():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 90
    imports = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"import torch"}
