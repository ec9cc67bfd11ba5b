"""examples/one_page.py: each of its functions against siren.py's, and the whole of it."""

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
SEEDS = range(6)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def test_token_stats(seed, dtype):
    logits, tokens = random_logits(seed, dtype)
    logp, entropy = one_page.token_stats(logits, tokens)
    due = siren.token_stats(logits, tokens, one_page.P)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(logp, due["logp"], **close)
    torch.testing.assert_close(entropy, due["nucleus_entropy"], **close)
    for found, other in ((logp, due["logp"]), (entropy, due["nucleus_entropy"])):
        weights = torch.randn(B, T, generator=torch.Generator().manual_seed(1)).to(dtype)
        of_other = gradient((weights * other).sum(), logits)
        torch.testing.assert_close(
            gradient((weights * found).sum(), logits), of_other, **close
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_peaks_and_aggregate_entropy(seed):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(B, T, dtype=torch.float64, generator=generator)
    entropy = (5 * entropy).round() / 5 if seed % 2 else entropy  # ties, and zeros
    entropy[0] = 0.0  # a response without a peak
    entropy.requires_grad_()
    mask = torch.ones(B, T, dtype=torch.bool)
    peak = siren.peak_mask(entropy, mask, one_page.TAU)
    due = siren.aggregate_entropy(entropy, peak, mask)
    found = one_page.aggregate_entropy(entropy)
    torch.testing.assert_close(found, due)
    of_found = gradient(found, entropy)
    torch.testing.assert_close(of_found, gradient(due, entropy))
    assert torch.equal(of_found > 0, peak)  # the gradient shows where the peaks are


@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, B, T, dtype=torch.float64, generator=generator)
    logp = (-1 + 0.3 * values[0]).requires_grad_()
    old_logp = -1 + 0.3 * values[1]
    adv = values[2, :, 0]
    mask = torch.ones(B, T, dtype=torch.bool)
    found = one_page.policy_loss(logp, old_logp, adv[:, None])
    due, stats = siren.policy_loss(
        logp, old_logp, adv, mask, T, clip_low=one_page.CLIP, clip_high=one_page.CLIP
    )
    torch.testing.assert_close(found, due)
    torch.testing.assert_close(gradient(found, logp), gradient(due, logp))
    assert 0.1 < stats["clip_fraction"] < 0.9


def train_with_siren(regularizer, beta):
    """one_page.train, written again with the functions of siren.py."""
    torch.manual_seed(0)
    policy = torch.nn.Embedding(one_page.V + 1, one_page.V)
    torch.nn.init.zeros_(policy.weight)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    mask = torch.ones(one_page.B, one_page.T, dtype=torch.bool)
    anchor = None
    for step in range(1, 201):
        tokens = torch.zeros(one_page.B, one_page.T, dtype=torch.long)
        with torch.no_grad():
            for t in range(one_page.T):
                tokens[:, t] = (
                    one_page.logits_of(policy, tokens)[:, t].softmax(-1).multinomial(1)[:, 0]
                )
            old = siren.token_stats(one_page.logits_of(policy, tokens), tokens, one_page.P)
        falls = [any(a > b for a, b in pairwise(ids)) for ids in tokens.tolist()]
        rewards = 1.0 - torch.tensor(falls).to(torch.get_default_dtype())
        adv = siren.group_advantages(rewards, one_page.GROUP)
        for i in range(2):
            now = siren.token_stats(one_page.logits_of(policy, tokens), tokens, one_page.P)
            clips = {"clip_low": one_page.CLIP, "clip_high": one_page.CLIP}
            loss, _ = siren.policy_loss(
                now["logp"], old["logp"], adv, mask, one_page.T, **clips
            )
            h = now["nucleus_entropy"]
            if anchor is None:
                _, stats = siren.siren_loss(loss, h, mask, 0.0, 0.0, one_page.TAU)
                anchor = stats["h_agg"].item()
            loss, stats = siren.siren_loss(
                loss, h, mask, anchor, beta, one_page.TAU, regularizer
            )
            if i == 0:
                h_agg = stats["h_agg"].item()  # as the update before has not been done yet
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = {tuple(ids) for ids, fell in zip(tokens.tolist(), falls) if not fell}
        yield step, rewards.mean().item(), h_agg, anchor, len(right)


def table(rows):
    lines = []
    for step, *values in rows:
        if step % 50 == 0:
            lines.append("{:4}{:8.3f}{:8.3f}{:8.3f}{:8}".format(step, *values))
    return lines


@pytest.mark.parametrize(("regularizer", "beta"), [("anchor", 0.3), ("none", 0.0)])
def test_a_run_with_the_functions_of_siren_prints_the_same_table(regularizer, beta, capsys):
    """In float64, so that no rounding error ever changes what is sampled."""
    torch.set_default_dtype(torch.float64)
    try:
        one_page.train(beta)
        due = table(train_with_siren(regularizer, beta))
    finally:
        torch.set_default_dtype(torch.float32)
    assert capsys.readouterr().out.splitlines() == due


def command(*words, folder=ROOT):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_and_what_its_docstring_promises(tmp_path):
    """Another machine prints other digits, so the docstring says "about"."""
    promised = {}
    for line in one_page.__doc__.splitlines():
        if "python examples/one_page.py" in line:
            name = "none" if ".py 0" in line else "siren"
            promised[name] = [float(x) for x in line.split()[-5:]]
    assert set(promised) == {"none", "siren"}
    for name, due in promised.items():
        done = command(*["0"] * (name == "none"), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = done.stdout.splitlines()
        assert len(rows) == 4
        first, last = ([float(x) for x in row.split()] for row in (rows[0], rows[-1]))
        assert [first[0], last[0]] == [50, 200]
        assert last[1] > 0.95 and last[3] == first[3] == pytest.approx(due[3], abs=0.02)
        assert last[2] == pytest.approx(due[2], abs=0.2)
        assert last[4] > 90 if name == "siren" else last[4] < 60  # different and right
    assert not list(tmp_path.iterdir())


def test_a_misspelt_argument_is_an_error():
    wrong = command("bonus")
    assert (
        wrong.returncode == 2
        and "invalid float value: 'bonus'" in wrong.stderr.splitlines()[-1]
    )


def test_it_is_one_page_and_needs_nothing_but_torch():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 90
    imports = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"import argparse", "import torch"}
