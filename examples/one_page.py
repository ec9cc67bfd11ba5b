"""SIREN, selective entropy regularization (arXiv 2509.25133). The complete version: siren.py

A policy learns to write 6 digits from 0 to 7. A response is right if no digit is more than 2
away from the digit before it, as in 3 5 4 4 2 1. There are three losses to learn with:

    none    policy loss
    bonus   policy loss - bonus * H              H: the mean entropy of all positions
    siren   policy loss + beta * (H_agg - H*)^2

H_agg is the mean entropy of the likely tokens (top-p mask) at the most undecided positions
(peak-entropy mask). The anchor H* is H_agg before training: SIREN is self-anchored.
`python examples/one_page.py` takes about 10 seconds and prints, without the last column:

    loss    reward      H*   H_agg  different right responses (of 512)
    none     1.000   1.832   0.000      10     It repeats itself: the entropy collapses.
    bonus    0.000   1.832   3.466       0     It writes nonsense: the entropy explodes.
    siren    0.998   1.832   1.376     199     It is right in many ways.
"""

import torch
from torch.distributions import Categorical

B = 512  # responses in a step
T = 6  # tokens in a response: always 6, so there is no padding
V = 40  # tokens in the vocabulary: the digits 0 to 7, and 32 useless tokens
P = 0.8  # p of the top-p mask, as in the paper
TAU = 0.8  # tau of the peak-entropy mask, as in the paper


def token_stats(logits, tokens):
    """For each position: log pi(token), where pi is the policy; H, the entropy of pi; and H',
    the entropy of pi on its nucleus, the fewest tokens with probability P together. A bonus
    on H makes useless tokens likelier. They are outside the nucleus, so H' ignores them."""
    pi = Categorical(logits=logits)
    log_pi = pi.logits.sort(-1, descending=True)[0]  # the last axis is now the rank
    before = log_pi.exp().cumsum(-1) - log_pi.exp()  # pi = 0.6 0.3 0.1: before = 0.0 0.6 0.9
    outside = before >= P  # top-p mask: the first two reach P = 0.8, so the third is outside
    q = Categorical(logits=log_pi.masked_fill(outside, -1e9))  # q = 2/3 1/3 0: exp(-1e9) = 0
    return pi.log_prob(tokens), pi.entropy(), q.entropy()  # [B, T] each


def aggregate_entropy(entropy):
    """H_agg: the mean of H' [B, T] over the peaks of each response, then over the responses.
    Peaks are the positions with the highest H': 2 of 6, or more if some are equal."""
    theta = entropy.quantile(TAU, dim=1, keepdim=True)  # [B, 1]: the second highest H' of 6
    peak = (entropy >= theta) & (entropy > 0)  # where H' = 0, one token is sure: no choice
    return ((entropy * peak).sum(1) / peak.sum(1).clamp(min=1)).mean()  # no peak counts as 0


def policy_loss(logp, old_logp, adv):
    """PPO's clipped loss. Tokens become likelier where adv > 0, less likely where adv < 0."""
    ratio = (logp - old_logp).exp()  # [B, T]: probability now / when the token was sampled
    return -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()  # no gain beyond 20%


def train(name, bonus, beta):
    torch.manual_seed(0)
    policy = torch.nn.Sequential(torch.nn.Embedding(V + 1, 32), torch.nn.Linear(32, V))
    policy[1].bias.data[8:] -= 4.0  # useless tokens are unlikely, as after pretraining
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for step in range(60):
        tokens = torch.full((B, T + 1), V)  # token V stands before the first digit
        with torch.no_grad():
            for t in range(T):  # 1. Sample. This policy sees only the last token.
                tokens[:, t + 1] = Categorical(logits=policy(tokens[:, t])).sample()
            seen, tokens = tokens[:, :-1], tokens[:, 1:]  # [B, T] each
            old_logp, _, nucleus_entropy = token_stats(policy(seen), tokens)
        h_agg = aggregate_entropy(nucleus_entropy)
        if step == 0:
            anchor = h_agg  # H*
        right = (tokens < 8).all(1) & (tokens.diff(dim=1).abs() <= 2).all(1)  # [B]
        reward = right.float()[:, None]  # 2. Reward: 1 if right, else 0.
        adv = reward - reward.mean()  # [B, 1]: better than the average response? (Dr.GRPO)
        for _ in range(2):  # 3. Update, twice with the same responses.
            logp, entropy, nucleus_entropy = token_stats(policy(seen), tokens)
            loss = policy_loss(logp, old_logp, adv) - bonus * entropy.mean()
            # The policy loss pulls H_agg down, the square pulls it up: it ends in between.
            loss = loss + beta * (aggregate_entropy(nucleus_entropy) - anchor) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    different = len(tokens[right].unique(dim=0))
    print(f"{name:6}{reward.mean():8.3f}{anchor:8.3f}{h_agg:8.3f}{different:8}")


if __name__ == "__main__":
    print("loss    reward      H*   H_agg  different right responses (of 512)")
    train("none", bonus=0.0, beta=0.0)
    train("bonus", bonus=1.0, beta=0.0)  # 0.03 gives 414 different ones, but 0.1 explodes
    train("siren", bonus=0.0, beta=1.0)
