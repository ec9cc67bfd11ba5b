"""SIREN (arXiv 2509.25133) on one page: reinforcement learning that keeps the entropy.

The task: write five digits from 0 to 7, each at least as large as the one before it. 0 2 2 5 7
is right, its reward is 1; 0 2 1 5 7 is wrong, its reward is 0. 792 responses are right. With
rewards alone, a policy writes fewer and fewer different ones: its entropy collapses. A bonus
for entropy would help, but there is no value at which it stops: with the 150,000 tokens of a
language model, the entropy explodes. SIREN pulls an entropy, H_agg, to the value H* that it
had before training (self-anchored), from below and from above:

    loss = policy_loss + beta * (H_agg - H*)^2

Two masks keep tokens and positions out of H_agg at which entropy does harm. This file trains
with beta = 0 and with beta = 0.3. Its last lines, for the 512 responses of step 200:

    beta  step  reward   H_agg      H*  different right responses
     0.0   200   1.000   0.156   1.946   66
     0.3   200   1.000   1.577   1.946  151
"""

import torch

B, T, V = 512, 5, 8  # responses in a step, digits in a response, digits to choose from
P = 0.8  # how much probability the nucleus holds
PEAKS = 1  # how many positions of a response are peaks: a fifth of T, as in the paper


def nucleus_entropy(pi):
    """H' [B, T]: the entropy of a policy pi [B, T, V] on its nucleus, which is the fewest
    tokens whose probabilities add up to P or more (top-p mask). All others are useless."""
    pi = pi.sort(-1, descending=True)[0]  # for example 0.6 0.3 0.1
    mass_before = pi.cumsum(-1) - pi  # 0.0 0.6 0.9: here the sum has reached P without 0.1
    q = pi * (mass_before < P)  # 0.6 0.3 0
    q = q / q.sum(-1, keepdim=True)  # 2/3 1/3 0
    return -(q * (q + 1e-30).log()).sum(-1)  # 1e-30: log 0 is -inf


def aggregate_entropy(entropy):
    """H_agg: the mean of H' [B, T] over the peaks of a response, then over the responses. The
    peaks are the positions with the highest H' (peak-entropy mask). At the others there is
    less to choose, and more entropy would make mistakes: after a 7, only 7 is right."""
    theta = entropy.topk(PEAKS, dim=1).values[:, -1:]  # [B, 1], the lowest H' of a peak
    peak = entropy >= theta  # more than PEAKS, if H' is the same at several positions
    return ((entropy * peak).sum(1) / peak.sum(1)).mean()


def train(beta):
    torch.manual_seed(0)
    # the policy: a row of logits for each digit that may come before, all equal at first; the
    # last row, V, is for the start of a response
    table = torch.zeros(V + 1, V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    for step in range(1, 201):
        # 1. sample B responses, one digit after the other
        columns = [torch.full((B,), V)]  # the start
        for _ in range(T):
            pi = table[columns[-1]].softmax(-1)  # [B, V]
            columns.append(pi.multinomial(1)[:, 0])
        before = torch.stack(columns[:-1], 1)  # [B, T]
        tokens = torch.stack(columns[1:], 1)  # [B, T]
        # 2. reward, and advantage: how much better than the others is a response?
        right = (tokens >= before)[:, 1:].all(1)  # [B]
        rewards = right.float()
        adv = rewards - rewards.mean()  # [B]; a single group, no division by std (Dr.GRPO)
        # 3. the loss; with one update per batch there is no ratio to be clipped
        log_pi = table[before].log_softmax(-1)  # [B, T, V]
        logp = log_pi.gather(-1, tokens[..., None])[..., 0]  # [B, T]
        policy_loss = -(adv[:, None] * logp).mean()  # better responses become likelier
        h_agg = aggregate_entropy(nucleus_entropy(log_pi.exp()))
        if step == 1:
            anchor = h_agg.item()  # H*: log 7, for 7 of 8 equally likely digits reach P
        loss = policy_loss + beta * (h_agg - anchor) ** 2
        # 4. update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            different = len(tokens[right].unique(dim=0))
            numbers = f"{rewards.mean():8.3f}{h_agg:8.3f}{anchor:8.3f}{different:5}"
            print(f"{beta:8.1f}{step:6}{numbers}")


if __name__ == "__main__":
    print("    beta  step  reward   H_agg      H*  different right responses")
    train(beta=0.0)
    train(beta=0.3)
