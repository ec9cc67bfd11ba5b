"""SIREN (arXiv 2509.25133) on one page: reinforcement learning that keeps responses diverse.

The task: write five digits from 0 to 7, each at least as large as the one before it. 0 2 2 5 7
is right, its reward is 1; 0 2 1 5 7 is wrong, its reward is 0. A policy that learns from these
rewards becomes more and more certain. It samples fewer and fewer different responses: this is
the collapse of its entropy. So SIREN adds a term to the loss. The term holds H_agg, an entropy
of some tokens, near H*, the value that H_agg had before training:

    loss = policy_loss + beta * (H_agg - H*)^2

Two masks decide what is in H_agg. The top-p mask leaves out unlikely tokens: a language model
has more than 100,000 of them, and more entropy would make all of them likelier. The
peak-entropy mask leaves out positions at which there is little to choose, and more entropy
would make mistakes: here, after a 7, only 7 is right.

This file trains twice, without the term and with it. It prints what the last batch was like:

    beta 0.0   reward 1.000   H_agg 0.156   H* 1.946   different responses:  66 of 512
    beta 0.3   reward 1.000   H_agg 1.577   H* 1.946   different responses: 151 of 512
"""

import torch

B, T, V = 512, 5, 8  # responses in a batch, digits in a response, digits to choose from
P = 0.8  # the top-p mask keeps 80 % of the probability, as in the paper
PEAKS = T // 5  # the peak-entropy mask keeps 20 % of the positions, as in the paper: here, 1


def nucleus_entropy(pi):
    """H' [B, T]: the entropy of each position after the top-p mask. The mask keeps the fewest
    tokens whose probabilities pi [B, T, V] add up to P or more."""
    pi = pi.sort(-1, descending=True).values  # for example 0.6 0.3 0.1
    mass_before = pi.cumsum(-1) - pi  # 0.0 0.6 0.9: the sum of those before this one
    q = pi * (mass_before < P)  # 0.6 0.3 0
    q = q / q.sum(-1, keepdim=True)  # 2/3 1/3 0: probabilities again
    return -(q * (q + 1e-30).log()).sum(-1)  # 1e-30: 0 * log 0 would not be 0


def aggregate_entropy(entropy):
    """H_agg: the mean of H' [B, T] over the positions of each response that the peak-entropy
    mask keeps, those with the highest H'; then over all responses."""
    peaks = entropy.topk(PEAKS, dim=1).values  # [B, PEAKS]
    return peaks.mean()


def train(beta):
    torch.manual_seed(0)
    # The policy is a table: row d has the logits of the digit that follows the digit d; row V
    # has those of the first digit. Before training all digits are equally likely
    table = torch.zeros(V + 1, V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    for step in range(200):
        # 1. sample B responses, one digit after the other
        digits = [torch.full((B,), V)]  # V: no digit yet
        for _ in range(T):
            pi = table[digits[-1]].softmax(-1)  # [B, V]
            digits.append(pi.multinomial(1)[:, 0])
        previous = torch.stack(digits[:-1], 1)  # [B, T]
        tokens = torch.stack(digits[1:], 1)  # [B, T]
        # 2. the reward, and the advantage: how much better than the mean is a response?
        rewards = (tokens.diff(dim=1) >= 0).all(1).float()  # [B]
        adv = rewards - rewards.mean()  # [B]: GRPO's, without std, in a single group
        # 3. the loss. There is one update per batch, so PPO's ratio is 1 and is left out
        pi = table[previous].softmax(-1)  # [B, T, V]
        logp = pi.gather(-1, tokens[..., None])[..., 0].log()  # [B, T], of the sampled tokens
        policy_loss = -(adv[:, None] * logp).mean()  # makes tokens with adv > 0 likelier
        h_agg = aggregate_entropy(nucleus_entropy(pi))
        if step == 0:
            anchor = h_agg.item()  # H*: 7 equally likely digits reach P, so it is log 7
        loss = policy_loss + beta * (h_agg - anchor) ** 2
        # 4. the update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"beta {beta}   reward {rewards.mean():.3f}   H_agg {h_agg:.3f}   ", end="")
    print(f"H* {anchor:.3f}   different responses: {len(tokens.unique(dim=0)):3} of {B}")


if __name__ == "__main__":
    train(beta=0.0)
    train(beta=0.3)
