"""SIREN's loss in a training loop of one's own: here a small recurrent network learns to count up.

    python examples/copy_loss.py                        # SIREN
    python examples/copy_loss.py none                   # without the regulariser: entropy collapses

siren.py is needed for one thing, the import below. Put its text from "# === begin: copy from here"
to "# === end: copy to here" in the place of that import, and a loop needs nothing but torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
from siren import group_advantages, minibatch_totals, siren_loss, token_stats

VOCAB, LENGTH, RESPONSES, GROUP = 8, 5, 512, 8


class Policy(torch.nn.Module):
    """Any network will do that gives logits [B, T, V], of which [:, t] predicts tokens[:, t]."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB + 1, hidden)  # the last one starts a response
        self.rnn = torch.nn.GRU(hidden, hidden, batch_first=True)
        self.head = torch.nn.Linear(hidden, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        start = torch.full_like(tokens[:, :1], VOCAB)
        return self.head(self.rnn(self.embed(torch.cat([start, tokens[:, :-1]], 1)))[0])


@torch.no_grad()
def sample(policy: Policy) -> torch.Tensor:
    """Responses [B, T], one token after the other."""
    tokens = torch.zeros(RESPONSES, LENGTH, dtype=torch.long)
    for t in range(LENGTH):
        tokens[:, t] = policy(tokens)[:, t].softmax(-1).multinomial(1)[:, 0]
    return tokens


def train(regularizer: str = "anchor", steps: int = 60, seed: int = 0) -> list[dict[str, float]]:
    """Each step's reward, H_agg and anchor."""
    torch.manual_seed(seed)
    policy, anchor, records = Policy(), None, []
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for _ in range(steps):
        # 1. sample and reward: a response is right if its tokens never go down
        tokens = sample(policy)
        mask = torch.ones_like(tokens, dtype=torch.bool)  # all positions: no response ends early
        rewards = (tokens.diff(dim=1) >= 0).all(1).float()
        adv = group_advantages(rewards, GROUP)
        # 2. score the responses before any update; the first H_agg is the anchor
        with torch.no_grad():
            old = token_stats(policy(tokens), tokens, top_p=0.8)
        h_agg = minibatch_totals(old["nucleus_entropy"], mask, 0.8)["h_agg"]
        anchor = h_agg if anchor is None else anchor
        # 3. as many updates as one likes; the ratio to the old log-probabilities is clipped
        for _ in range(2):
            logits = policy(tokens)
            loss, _ = siren_loss(
                logits, tokens, old["logp"], adv, mask, anchor, beta=0.3, regularizer=regularizer
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = {"reward": rewards.mean(), "h_agg": h_agg, "anchor": anchor}
        records.append({key: float(value) for key, value in values.items()})
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("regularizer", nargs="?", default="anchor", choices=["anchor", "none"])
    for step, record in enumerate(train(parser.parse_args().regularizer)):
        if step % 10 == 9:
            print(step + 1, {key: round(value, 3) for key, value in record.items()})
