"""SIREN (arXiv 2509.25133) on one page: learning from rewards without losing the entropy.

The task: write five digits from 0 to 7 that never become smaller. 0 2 2 5 7 is right and has
the reward 1; 0 2 1 5 7 is wrong and has the reward 0. A policy that learns from rewards alone
soon writes few of the 792 right responses: its entropy collapses. SIREN adds a term to the
loss, which pulls an entropy of the policy, H_agg, back to its value before training, H*:

    loss = policy_loss + beta * (H_agg - H*)^2

    python examples/one_page.py      # beta = 0.3; it ends with 200  1.000  1.375  1.946  130
    python examples/one_page.py 0    # beta = 0;   it ends with 200  1.000  0.075  1.946   44
Columns: step, mean reward, H_agg, H*, how many different ones of 512 responses are right.
"""

import argparse

import torch

B, T, V = 512, 5, 8  # responses in a step, digits of a response, vocabulary
GROUP = 8  # a response is compared with the mean of its group
CLIP, P, TAU = 0.2, 0.8, 0.8  # of PPO's loss, the top-p mask, the peak-entropy mask


def logits_of(policy, tokens):
    """[B, T] -> [B, T, V]. The policy is a table with a row of logits for each previous digit.
    The last row, number V, is for the first digit of a response."""
    return policy(
        torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=V)
    )  # the digits before


def token_stats(logits, tokens):
    """For each position, log pi(its token) and H': [B, T] each. H' is the entropy of the
    nucleus, the fewest tokens whose probabilities add up to P or more (top-p mask)."""
    log_pi = logits.log_softmax(-1)
    logp = log_pi.gather(-1, tokens[..., None])[..., 0]
    ranked = log_pi.sort(-1, descending=True)[0]  # for example, pi = 0.6 0.3 0.1
    mass_before = ranked.exp().cumsum(-1) - ranked.exp()  # 0.0 0.6 0.9: the third is outside
    log_q = ranked.masked_fill(mass_before >= P, -torch.inf).log_softmax(-1)  # q = 2/3 1/3 0
    entropy = -(log_q.exp() * log_q.clamp(min=-99)).sum(-1)  # 0 * -inf would be NaN
    return logp, entropy


def aggregate_entropy(entropy):
    """H_agg: the mean of H' over the peaks of each response, then over the responses. Peaks
    are the positions whose H' reaches the TAU-quantile of the response (peak-entropy mask)."""
    theta = entropy.double().quantile(TAU, 1, keepdim=True)  # [B, 1]
    peak = (entropy >= theta) & (entropy > 0)  # H' = 0: nothing to choose here
    return ((entropy * peak).sum(1) / peak.sum(1).clamp(min=1)).mean()


def policy_loss(logp, old_logp, adv):
    """PPO's loss: tokens become likelier where adv > 0, and less likely where adv < 0."""
    ratio = (logp - old_logp).exp()  # [B, T]
    return -torch.min(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv).mean()


def train(beta):
    torch.manual_seed(0)
    policy = torch.nn.Embedding.from_pretrained(torch.zeros(V + 1, V), freeze=False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    for step in range(1, 201):
        # 1. sample the responses, one digit after the other
        tokens = torch.zeros(B, T, dtype=torch.long)
        for t in range(T):
            tokens[:, t] = logits_of(policy, tokens)[:, t].softmax(-1).multinomial(1)[:, 0]
        # 2. reward them; the advantage of a response is its reward minus its group's mean
        right = (tokens.diff(dim=1) >= 0).all(1)  # [B]
        rewards = right.float().view(-1, GROUP)
        adv = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)  # [B, 1]
        # 3. measure, before any update
        old_logp, entropy = token_stats(logits_of(policy, tokens).detach(), tokens)
        h_agg = aggregate_entropy(entropy)
        if step == 1:
            anchor = h_agg  # H*
        # 4. update, twice with the same responses
        for _ in range(2):
            logp, entropy = token_stats(logits_of(policy, tokens), tokens)
            pull = (aggregate_entropy(entropy) - anchor) ** 2
            loss = policy_loss(logp, old_logp, adv) + beta * pull
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
