"""SIREN (arXiv 2509.25133) on one page: reinforcement learning that keeps answers diverse.

The task: write five digits from 0 to 7, each at least as large as the one before it. 0 2 2 5 7
is right, its reward is 1; 0 2 1 5 7 is wrong, its reward is 0. Of all 32768 responses 792 are
right. A policy that learns from these rewards alone becomes certain: it samples fewer and
fewer different responses, and its entropy collapses towards 0.

The naive cure is a bonus for entropy. A bonus never has enough: with the 150,000 tokens of a
language model, the entropy explodes. SIREN has an anchor instead, H*, the entropy before
training. The loss pulls the entropy H_agg to it, upwards and downwards (self-anchored):

    loss = policy_loss + beta * (H_agg - H*)^2

H_agg leaves out unlikely tokens (top-p mask) and the positions of a response at which there is
little to choose (peak-entropy mask). `python examples/one_page.py` prints, after 200 steps:

    beta = 0.0   reward 1.000   H_agg 0.156   H* 1.946    66 different responses of 512
    beta = 0.3   reward 1.000   H_agg 1.577   H* 1.946   151 different responses of 512

H_agg does not reach H* = log 7 again, because the rewards have made some digits so unlikely
that the top-p mask leaves them out.
"""

import torch

B, T, V = 512, 5, 8  # responses in a step, digits in a response, digits to choose from
P = 0.8  # of the top-p mask, as in the paper


def nucleus_entropy(pi):
    """H' [B, T] of the probabilities pi [B, T, V]: their entropy after the top-p mask. It
    keeps the nucleus, the fewest tokens whose probabilities add up to P or more."""
    pi = pi.sort(-1, descending=True)[0]  # an example: 0.6 0.3 0.1
    mass_before = pi.cumsum(-1) - pi  # of the tokens before this one: 0.0 0.6 0.9
    q = pi * (mass_before < P)  # 0.6 0.3 0
    q = q / q.sum(-1, keepdim=True)  # 2/3 1/3 0: probabilities again
    return -(q * (q + 1e-30).log()).sum(-1)  # 1e-30, since 0 * log 0 would be NaN


def aggregate_entropy(entropy):
    """H_agg, a number: the mean of H' [B, T] over the peaks of all responses. The peaks of a
    response are the fifth of its positions at which H' is highest: here, one of five."""
    return entropy.topk(T // 5, dim=1).values.mean()


def train(beta):
    torch.manual_seed(0)
    # The policy is a table: row d has the logits of the digit that follows the digit d; row V
    # has those of the first digit. Before training all digits are equally likely
    table = torch.zeros(V + 1, V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    for step in range(1, 201):
        # 1. sample B responses, one digit after the other
        digits = [torch.full((B,), V)]  # V: no digit yet
        for _ in range(T):
            pi = table[digits[-1]].softmax(-1)  # [B, V]
            digits.append(pi.multinomial(1)[:, 0])
        tokens = torch.stack(digits[1:], 1)  # [B, T]
        previous = torch.stack(digits[:-1], 1)  # [B, T]
        # 2. the reward, and the advantage: how much better than the mean is a response?
        right = (tokens.diff(dim=1) >= 0).all(1)  # [B]
        rewards = right.float()
        adv = rewards - rewards.mean()  # [B]
        # 3. the loss: responses with adv > 0 become likelier, those with adv < 0 less likely
        log_pi = table[previous].log_softmax(-1)  # [B, T, V]
        logp = log_pi.gather(-1, tokens[..., None])[..., 0]  # [B, T], of the sampled tokens
        policy_loss = -(adv[:, None] * logp).mean()
        h_agg = aggregate_entropy(nucleus_entropy(log_pi.exp()))
        if step == 1:
            anchor = h_agg.item()  # H*
        loss = policy_loss + beta * (h_agg - anchor) ** 2
        # 4. the update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    different = len(tokens[right].unique(dim=0))
    print(f"beta = {beta}   reward {rewards.mean():.3f}   H_agg {h_agg:.3f}   ", end="")
    print(f"H* {anchor:.3f}   {different:3} different responses of {B}")


if __name__ == "__main__":
    train(beta=0.0)
    train(beta=0.3)
