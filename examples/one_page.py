"""SIREN (arXiv 2509.25133) on one page: reinforcement learning that keeps responses diverse.

The task: write five digits from 0 to 7, each at least as large as the one before it. 0 2 2 5 7
is right, its reward is 1; 0 2 1 5 7 is wrong, its reward is 0. 792 responses are right, but a
policy that learns from these rewards samples fewer and fewer of them: its entropy collapses. A
naive cure is a bonus for entropy. But in a vocabulary of 100,000 tokens it makes all useless
tokens likelier, and the entropy explodes. (This task is too small to show the explosion.)

SIREN adds a term to the loss that pulls an entropy, H_agg, towards its own value before
training, the anchor H*:

    loss = policy_loss + beta * (H_agg - H*)^2

H_agg is computed with two masks. The top-p mask leaves out unlikely tokens. The peak-entropy
mask leaves out the positions of a response with low entropy. There is little choice there, and
more entropy would only mean more mistakes: after a 7, only 7 is right.

This file trains twice, without the term and with it, and then prints:

    beta 0.0   reward 1.000   different responses:  66 of 512
    beta 0.3   reward 1.000   different responses: 151 of 512
"""

import torch

B, T, V = 512, 5, 8  # responses in a batch, tokens (digits) in a response, vocabulary
P = 0.8  # the top-p mask keeps 80 % of the probability (as in the paper)
PEAKS = 1  # the peak-entropy mask keeps 1 of the 5 positions (20 %, as in the paper)


def nucleus_entropy(pi):
    """The entropy H' [B, T] of the policy pi [B, T, V] with the top-p mask, which keeps the
    nucleus: the fewest tokens whose probabilities add up to P or more."""
    pi = pi.sort(-1, descending=True).values  # for example 0.6 0.3 0.1
    mass_before = pi.cumsum(-1) - pi  # 0.0 0.6 0.9: the sum of those before this one
    q = pi * (mass_before < P)  # 0.6 0.3 0
    q = q / q.sum(-1, keepdim=True)  # 2/3 1/3 0: probabilities again
    return -(q * (q + 1e-30).log()).sum(-1)  # 1e-30, since 0 * log 0 would be NaN


def aggregate_entropy(entropy):
    """H_agg: the mean of H' [B, T] over the peaks, the positions of each response where H' is
    highest (peak-entropy mask)."""
    return entropy.topk(PEAKS, dim=1).values.mean()


def train(beta):
    torch.manual_seed(0)
    # The policy is a table: row d has the logits of the digit that follows the digit d; row V
    # has those of the first digit. Before training all digits are equally likely
    table = torch.zeros(V + 1, V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    for step in range(200):
        # 1. sample B responses, one digit after the other
        columns = [torch.full((B,), V)]  # V: no digit yet
        for _ in range(T):
            pi = table[columns[-1]].softmax(-1)  # [B, V]
            columns.append(pi.multinomial(1)[:, 0])
        previous = torch.stack(columns[:-1], 1)  # [B, T]
        tokens = torch.stack(columns[1:], 1)  # [B, T]
        # 2. the reward; the advantage is positive if a response is better than usual
        rewards = (tokens.diff(dim=1) >= 0).all(1).float()  # [B]
        adv = rewards - rewards.mean()  # [B], as in Dr.GRPO
        # 3. the loss. A batch is used for one update, so PPO's ratio and clip are not needed
        pi = table[previous].softmax(-1)  # [B, T, V]
        logp = pi.gather(-1, tokens[..., None])[..., 0].log()  # [B, T], of the sampled tokens
        policy_loss = -(adv[:, None] * logp).mean()  # makes tokens with adv > 0 likelier
        h_agg = aggregate_entropy(nucleus_entropy(pi))
        if step == 0:
            anchor = h_agg.item()  # H*
        loss = policy_loss + beta * (h_agg - anchor) ** 2
        # 4. the update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    n = len(tokens.unique(dim=0))
    print(f"beta {beta}   reward {rewards.mean():.3f}   different responses: {n:3} of {B}")


if __name__ == "__main__":
    train(beta=0.0)
    train(beta=0.3)
