"""The whole of SIREN (arXiv 2509.25133, selective entropy regularization) on one page.
A network learns to write five digits from 0 to 7 that never become smaller: 0 2 2 5 7 is
right, 0 2 1 5 7 is wrong; 792 responses are right. Training makes right responses likelier,
until only a few of them are left: the entropy collapses. SIREN's second term of the loss pulls
the entropy H_agg back to its first value, the anchor H*:  policy loss + beta (H_agg - H*)^2
    python examples/one_page.py         prints after 60 steps:  60  0.996  1.557  1.944  44
    python examples/one_page.py none    (no second term)        60  0.998  0.002  1.944   1
The columns are: step  reward   h_agg  anchor  different right responses
"""

import argparse

import torch

B, T, V = 512, 5, 8  # responses, digits of a response (always 5: no padding), vocabulary
GROUP, CLIP = 8, 0.2  # as in PPO and GRPO; with prompts, a group answers the same prompt
P, TAU, BETA = 0.8, 0.8, 1.0  # of the top-p and the peak-entropy mask; weight of SIREN's term


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V + 1, 32)  # the token V stands before a response
        self.rnn = torch.nn.GRU(32, 32, batch_first=True)
        self.head = torch.nn.Linear(32, V)

    def forward(self, tokens):  # [B, T] -> logits [B, T, V] of each token, from those before
        before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=V)
        return self.head(self.rnn(self.embed(before))[0])


def token_stats(logits, tokens):
    """For each position: log pi(token), where pi is the policy, and H', its entropy on the
    nucleus, the fewest tokens whose probabilities add up to P or more (top-p mask). A bonus
    for the entropy of all tokens would make useless ones likelier: an explosion."""
    log_pi = logits.log_softmax(-1)  # [B, T, V]
    logp = log_pi.gather(-1, tokens[..., None])[..., 0]  # [B, T]
    ranked = log_pi.sort(-1, descending=True)[0]  # the likeliest token first
    before = ranked.exp().cumsum(-1) - ranked.exp()  # of pi = 0.6 0.3 0.1: 0.0 0.6 0.9
    log_q = ranked.masked_fill(before >= P, -torch.inf).log_softmax(-1)  # q = 2/3 1/3 0
    return logp, -(log_q.exp() * log_q.clamp(min=-99)).sum(-1)  # 0 * -inf would be NaN


def aggregate_entropy(entropy):
    """H_agg: the mean of H' [B, T] over the peaks of each response, then over the responses.
    Peaks are the positions with the highest H': from the TAU-quantile on, so one of five
    (peak-entropy mask). Elsewhere there is less to choose, and entropy makes mistakes."""
    theta = entropy.double().quantile(TAU, 1, keepdim=True)  # [B, 1]
    peak = (entropy >= theta) & (entropy > 0)  # H' = 0: one sure token, so nothing to choose
    return ((entropy * peak).sum(1) / peak.sum(1).clamp(min=1)).mean()


def policy_loss(logp, old_logp, adv):
    """PPO's clipped loss: tokens become likelier where adv > 0, less likely where adv < 0."""
    ratio = (logp - old_logp.detach()).exp()  # [B, T]: pi now / pi when it sampled
    return -torch.min(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv).mean()


def train(beta):
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    print("step  reward   h_agg  anchor  different right responses")
    for step in range(1, 61):
        tokens = torch.zeros(B, T, dtype=torch.long)
        for t in range(T):  # 1. sample, a token at a time
            tokens[:, t] = policy(tokens)[:, t].softmax(-1).multinomial(1)[:, 0]
        right = (tokens.diff(dim=1) >= 0).all(1)  # [B]
        rewards = right.float().view(-1, GROUP)  # 2. reward, compared within a group
        adv = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)  # [B, 1]; Dr.GRPO: no std
        old_logp, entropy = token_stats(policy(tokens), tokens)  # 3. score before any update
        h_agg = aggregate_entropy(entropy).item()
        if step == 1:
            anchor = h_agg  # H*: here log 7, since 7 of 8 equally likely digits reach P
        for _ in range(2):  # 4. update, twice with the same responses
            logp, entropy = token_stats(policy(tokens), tokens)
            pull = (aggregate_entropy(entropy) - anchor) ** 2  # 0 where H_agg is H*
            loss = policy_loss(logp, old_logp, adv) + beta * pull  # H_agg ends in between
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 10 == 0:
            different = len(tokens[right].unique(dim=0))
            print(f"{step:4}{rewards.mean():8.3f}{h_agg:8.3f}{anchor:8.3f}{different:8}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("regularizer", nargs="?", choices=["siren", "none"], default="siren")
    train(0.0 if parser.parse_args().regularizer == "none" else BETA)
