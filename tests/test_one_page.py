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
B, T, V = 40, 6, 40
SEEDS = range(20)


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
    found = one_page.token_stats(logits, tokens)
    due = siren.token_stats(logits, tokens, one_page.P)
    # in float32, a logit of 250 is rounded by 1.5e-5
    close = {"rtol": 1e-5, "atol": 3e-5} if dtype == torch.float32 else {}
    full = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)  # siren.py's has no gradient
    torch.testing.assert_close(found[1], due["entropy"], **close)
    for value, other in zip(found, (due["logp"], full, due["nucleus_entropy"])):
        torch.testing.assert_close(value, other, **close)
        weights = torch.randn(B, T, generator=torch.Generator().manual_seed(1)).to(dtype)
        of_other = gradient((weights * other).sum(), logits)
        torch.testing.assert_close(
            gradient((weights * value).sum(), logits), of_other, **close
        )


def test_the_example_in_token_stats():
    """pi = 0.6 0.3 0.1: the nucleus is the first two, and q = 2/3 1/3."""
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    _, _, entropy = one_page.token_stats(logits, torch.tensor(0))
    q = torch.tensor([2 / 3, 1 / 3])
    torch.testing.assert_close(entropy, -(q * q.log()).sum())


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
    if seed % 2 == 0:
        assert (peak[1:].sum(1) == 2).all()  # "2 of 6"


@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, B, T, dtype=torch.float64, generator=generator)
    logp = (-1 + 0.3 * values[0]).requires_grad_()
    old_logp = -1 + 0.3 * values[1]
    adv = values[2, :, 0]
    mask = torch.ones(B, T, dtype=torch.bool)
    found = one_page.policy_loss(logp, old_logp, adv[:, None])
    due, stats = siren.policy_loss(logp, old_logp, adv, mask, T, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(found, due)
    torch.testing.assert_close(gradient(found, logp), gradient(due, logp))
    assert 0.1 < stats["clip_fraction"] < 0.9


def train_with_siren(name, weight):
    """one_page.train, written again with the functions of siren.py."""
    torch.manual_seed(0)
    size = one_page.V
    policy = torch.nn.Sequential(torch.nn.Embedding(size + 1, 32), torch.nn.Linear(32, size))
    with torch.no_grad():
        policy[1].bias[8:] -= 4
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    mask = torch.ones(one_page.B, one_page.T, dtype=torch.bool)
    anchor = None
    for _ in range(60):
        tokens = torch.full((one_page.B, 1), size)
        with torch.no_grad():
            for _ in range(one_page.T):
                pi = policy(tokens)[:, -1].softmax(-1)
                tokens = torch.cat([tokens, pi.multinomial(1)], 1)
            before, tokens = tokens[:, :-1], tokens[:, 1:]
            old = siren.token_stats(policy(before), tokens, one_page.P)
        right = [is_right(ids) for ids in tokens.tolist()]
        rewards = torch.tensor(right).to(torch.get_default_dtype())
        adv = siren.group_advantages(rewards, len(rewards))  # all answer the same prompt
        peak = siren.peak_mask(old["nucleus_entropy"], mask, one_page.TAU)
        h_agg = siren.aggregate_entropy(old["nucleus_entropy"], peak, mask).item()
        anchor = h_agg if anchor is None else anchor
        plain = name == "bonus"  # the naive bonus has neither mask
        top_p, tau = (1.0, 0.0) if plain else (one_page.P, one_page.TAU)
        regularizer = "anchor" if name == "siren" else name
        for _ in range(2):
            now = siren.token_stats(policy(before), tokens, top_p)
            loss, _ = siren.policy_loss(now["logp"], old["logp"], adv, mask, one_page.T)
            h = now["nucleus_entropy"]
            loss, _ = siren.siren_loss(loss, h, mask, anchor, weight, tau, regularizer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    different = {tuple(ids) for ids, ok in zip(tokens.tolist(), right) if ok}
    row = [rewards.mean().item(), anchor, h_agg]
    return f"{name:6}" + "".join(f"{x:8.3f}" for x in row) + f"{len(different):8}"


def is_right(ids):
    return all(x in range(8) for x in ids) and all(abs(x - y) <= 2 for x, y in pairwise(ids))


def test_the_example_of_a_right_response():
    assert "as in 3 5 4 4 2 1." in one_page.__doc__ and is_right([3, 5, 4, 4, 2, 1])


RUNS = [("none", 0.0, 0.0), ("bonus", 1.0, 0.0), ("siren", 0.0, 1.0)]


@pytest.mark.parametrize(("name", "bonus", "beta"), RUNS)
def test_a_run_with_the_functions_of_siren_prints_the_same(name, bonus, beta, capsys):
    """In float64, so that no rounding error ever changes what is sampled."""
    torch.set_default_dtype(torch.float64)
    try:
        one_page.train(name, bonus, beta)
        due = train_with_siren(name, bonus + beta)
    finally:
        torch.set_default_dtype(torch.float32)
    assert capsys.readouterr().out.splitlines() == [due]


def close_to(row, due):
    """Another processor may sample a few other tokens."""
    assert row[:2] == pytest.approx(due[:2], abs=0.01)  # reward, H*
    assert row[2] == pytest.approx(due[2], abs=0.1)  # H_agg
    assert row[3] == pytest.approx(due[3], rel=0.2, abs=3)  # different right responses


def test_the_command_prints_what_its_docstring_promises(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == ""
    head, *rows = done.stdout.splitlines()
    text = [line.strip() for line in one_page.__doc__.splitlines()]
    promised = text[text.index(head) + 1 :]
    assert [row.split()[0] for row in rows] == [name for name, *_ in RUNS]
    for row, due in zip(rows, promised, strict=True):
        name, *values = row.split()
        due_name, *due_values = due.split()[:5]
        assert name == due_name
        assert due.index(due_values[-1]) == row.index(values[-1])  # the same columns
        close_to([float(x) for x in values], [float(x) for x in due_values])
    none, bonus, its = (dict(zip("r*hd", map(float, row.split()[1:]))) for row in rows)
    assert none["r"] > 0.95 and none["h"] < 0.1 and none["d"] < 20  # collapse
    assert bonus["r"] < 0.01 and bonus["h"] > 1.5 * bonus["*"]  # explosion
    assert its["r"] > 0.95 and 1 < its["h"] < its["*"] and its["d"] > 100  # "in between"
    assert not list(tmp_path.iterdir())


def test_the_weights_of_a_bonus(capsys):
    """What the comment beside the bonus says."""
    (comment,) = [line for line in SCRIPT.read_text().splitlines() if 'train("bonus"' in line]
    assert comment.endswith("# 0.03 gives 414 different ones, but 0.1 explodes")
    one_page.train("bonus", 0.03, 0.0)
    one_page.train("bonus", 0.1, 0.0)
    good, bad = (
        [float(x) for x in line.split()[1:]] for line in capsys.readouterr().out.splitlines()
    )
    assert good[0] > 0.95 and good[3] == pytest.approx(414, rel=0.1)
    assert bad[0] < 0.01 and bad[2] > 1.5 * bad[1]


def test_it_is_one_page_and_needs_nothing_but_torch():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 90
    assert max(len(line) for line in text.splitlines()) <= 95
    imports = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"import torch", "from torch.distributions import Categorical"}


def test_an_import_runs_nothing():
    code = "from examples import one_page"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
