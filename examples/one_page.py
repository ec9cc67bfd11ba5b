"""SIREN in a training loop of one page: a small recurrent network learns to count up.

    python examples/copy_loss.py           # SIREN: many different right responses
    python examples/copy_loss.py none      # without the regulariser: the same one, again and again

A response is five digits from 0 to 7. It is right if no digit is smaller than the one before: 792
of the 32,768 responses are. The network knows nothing at first; it samples and is rewarded.

The loop needs five functions of siren.py. For a loop of your own, put the text of siren.py from
"# === begin: copy from here" to "# === end: copy to here" in the place of their import below; then
nothing but torch is needed.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
from siren import aggregate_entropy, group_advantages, nucleus_entropy, peak_mask, siren_loss

VOCAB, LENGTH, RESPONSES, GROUP = 8, 5, 512, 8  # a response is compared with the 7 of its group
TOP_P, PEAK_QUANTILE, BETA = 0.8, 0.8, 1.0  # SIREN's three numbers


class Policy(torch.nn.Module):
    """Tokens [B, T] -> logits [B, T, V], of which [:, t] predicts tokens[:, t]."""

    def __init__(self, hidden=32):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB + 1, hidden)  # the last one starts a response
        self.rnn = torch.nn.GRU(hidden, hidden, batch_first=True)
        self.head = torch.nn.Linear(hidden, VOCAB)

    def forward(self, tokens):
        before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=VOCAB)
        return self.head(self.rnn(self.embed(before))[0])


def train(regularizer="anchor", steps=60, seed=0):
    """Train; yield the numbers of each step."""
    torch.manual_seed(seed)
    policy, anchor = Policy(), None
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        # 1. sample a token at a time, then reward each response
        tokens = torch.zeros(RESPONSES, LENGTH, dtype=torch.long)  # [B, T]
        with torch.no_grad():
            for t in range(LENGTH):
                tokens[:, t] = policy(tokens)[:, t].softmax(-1).multinomial(1)[:, 0]
            logits = policy(tokens)  # [B, T, V], of the policy that sampled
        mask = torch.ones_like(tokens, dtype=torch.bool)  # False in padding: here there is none
        rewards = (tokens.diff(dim=1) >= 0).all(1).float()  # [B]

        # 2. score before any update; the first H_agg is the anchor
        adv = group_advantages(rewards, GROUP)  # [B]
        old_logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # [B, T]
        entropy = nucleus_entropy(logits, TOP_P)  # H' [B, T]
        h_agg = aggregate_entropy(entropy, peak_mask(entropy, mask, PEAK_QUANTILE), mask)
        anchor = h_agg if anchor is None else anchor

        # 3. update, here twice with the same responses
        for _ in range(2):
            loss, _ = siren_loss(
                policy(tokens), tokens, old_logp, adv, mask, anchor, beta=BETA, top_p=TOP_P,
                peak_quantile=PEAK_QUANTILE, regularizer=regularizer,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = tokens[rewards == 1].unique(dim=0)
        yield step, float(rewards.mean()), float(h_agg), float(anchor), len(right)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("regularizer", nargs="?", default="anchor", choices=["anchor", "none"])
    regularizer = parser.parse_args().regularizer
    print("step  reward   h_agg  anchor  different right responses")
    for step, *values in train(regularizer):
        if step % 10 == 0:
            print("{:4}{:8.3f}{:8.3f}{:8.3f}{:8}".format(step, *values))
