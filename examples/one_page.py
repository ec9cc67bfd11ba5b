"""SIREN (arXiv 2509.25133) on one page: reinforcement learning that keeps the entropy.

The task: write five digits from 0 to 7, none smaller than the one before it. 0 2 2 5 7 is
right, its reward is 1; 0 2 1 5 7 is wrong, its reward is 0. A policy that learns from rewards
alone soon writes only a few different responses: its entropy collapses. SIREN adds a term to
the loss. It pulls H_agg, an entropy of the policy, towards H*, the value that H_agg had before
training (a self-anchored regularizer):

    loss = policy_loss + beta * (H_agg - H*)^2

                               after 200 steps:  reward   H_agg      H*  different responses
    python examples/one_page.py    (beta = 0.3)   1.000   1.577   1.946  151
    python examples/one_page.py 0  (beta = 0)     1.000   0.156   1.946   66

H_agg stays below H*. For example, five digits with a probability of 0.2 each have H' = log 5 =
1.609, and the gradient of H' does not reach the digits outside of this nucleus.
"""

import argparse

import torch

B, T, V = 512, 5, 8  # responses in a step, digits in a response, digits to choose from
P = 0.8  # for the top-p mask
TAU = 0.8  # for the peak-entropy mask


def nucleus_entropy(log_pi):
    """H', [B, T], of the log-probabilities log_pi [B, T, V]: the entropy of the nucleus, the
    fewest digits whose probabilities add up to P or more, renormalised (top-p mask). Why a
    mask? More entropy of a vocabulary of 150,000 tokens would lift all the useless ones."""
    ranked = log_pi.sort(-1, descending=True)[0]  # for example the logs of 0.6 0.3 0.1
    mass_before = ranked.exp().cumsum(-1) - ranked.exp()  # 0.0 0.6 0.9: 0.1 is outside
    inside = mass_before < P
    log_q = ranked.masked_fill(~inside, -torch.inf).log_softmax(-1)  # logs of 2/3 1/3 0
    return -(log_q.exp() * log_q.masked_fill(~inside, 0.0)).sum(-1)


def aggregate_entropy(entropy):
    """H_agg: for each response the mean of H' [B, T] over its peaks; then the mean over the
    responses. Peaks are the positions with the highest H' of the response, from the
    TAU-quantile on (peak-entropy mask); here, the highest one of five. Why a mask? At other
    positions there is less to choose, and more entropy means more mistakes."""
    theta = entropy.quantile(TAU, 1, keepdim=True, interpolation="higher")  # [B, 1]
    peak = entropy >= theta
    return ((entropy * peak).sum(1) / peak.sum(1)).mean()


def train(beta):
    torch.manual_seed(0)
    # the policy: for each previous digit, the logits of the next one, all equal at first. The
    # row number V is for the first digit
    table = torch.zeros(V + 1, V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    print("step  reward   H_agg      H*  different right responses")
    for step in range(1, 201):
        # 1. sample B responses, a digit after the other
        sampled = torch.full((B, 1 + T), V)
        for t in range(T):
            pi = table[sampled[:, t]].softmax(-1)  # [B, V]
            sampled[:, t + 1] = pi.multinomial(1)[:, 0]
        tokens = sampled[:, 1:]  # [B, T]
        # 2. reward; the advantage of a response is how much better it is than the mean
        right = (tokens.diff(dim=1) >= 0).all(1)  # [B]
        rewards = right.float()
        adv = rewards - rewards.mean()
        # 3. score
        log_pi = table[sampled[:, :-1]].log_softmax(-1)  # [B, T, V]
        logp = log_pi.gather(-1, tokens[..., None])[..., 0]  # [B, T], of the sampled digits
        h_agg = aggregate_entropy(nucleus_entropy(log_pi))
        if step == 1:
            anchor = h_agg.item()  # H*: log 7, since 7 of 8 equally likely digits reach P
        # 4. update; responses that are better than the mean become likelier
        policy_loss = -(adv[:, None] * logp).mean()
        loss = policy_loss + beta * (h_agg - anchor) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            different = len(tokens[right].unique(dim=0))
            print(f"{step:4}{rewards.mean():8.3f}{h_agg:8.3f}{anchor:8.3f}{different:8}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("beta", type=float, nargs="?", default=0.3)
    train(parser.parse_args().beta)
