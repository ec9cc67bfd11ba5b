"""The whole of SIREN on one page. A small recurrent network learns to write five digits from 0
to 7 that do not fall: 0 2 2 5 7 is right, 0 2 1 5 7 is wrong. Right responses are rewarded and
become likelier, until it writes the same few again and again: the entropy of its choices, that
is, how undecided it is, has collapsed. SIREN holds it. The last line is about this:

                                        step  reward   h_agg  anchor  different right responses
    python examples/one_page.py           60   0.996   1.557   1.944      44
    python examples/one_page.py none      60   0.998   0.002   1.944       1    (without SIREN)
reward: the mean of 512 responses; h_agg: the entropy that is held, in nats; anchor: where."""

import argparse

import torch

B, T, V = 512, 5, 8  # responses of a step, tokens (digits) of a response, different tokens
GROUP, CLIP = 8, 0.2  # responses that are compared with each other; how far an update may go
P, TAU, BETA = 0.8, 0.8, 1.0  # SIREN's numbers: p of the nucleus, tau of the peaks, weight


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V + 1, 32)  # the last one starts a response
        self.rnn = torch.nn.GRU(32, 32, batch_first=True)
        self.head = torch.nn.Linear(32, V)

    def forward(self, tokens):  # [B, T] -> logits [B, T, V], at t from the tokens before t
        before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=V)
        return self.head(self.rnn(self.embed(before))[0])


def token_stats(logits, tokens):
    """Of each token: log pi, where pi is the policy; and H', the entropy of pi on its nucleus,
    the fewest tokens that have probability P together, so that useless ones are left alone."""
    log_pi = logits.log_softmax(-1)  # [B, T, V]
    logp = log_pi.gather(-1, tokens[..., None])[..., 0]  # [B, T]
    log_pi = log_pi.sort(-1, descending=True)[0]
    pi = log_pi.exp()
    outside = pi.cumsum(-1) - pi >= P  # the likelier tokens reach P without this one
    log_q = log_pi.masked_fill(outside, -torch.inf).log_softmax(-1)  # q = pi / pi(nucleus)
    return logp, -(log_q.exp() * log_q.masked_fill(outside, 0.0)).sum(-1)  # H' = -sum q log q


def aggregate_entropy(entropy):
    """H_agg: the mean of H' [B, T] over the peaks of each response, then over the responses.
    Peaks are the highest H' of a response (here 1 of 5): elsewhere little is to be chosen."""
    theta = entropy.double().quantile(TAU, 1, keepdim=True)  # [B, 1]: peaks are not below this
    peak = (entropy >= theta) & (entropy > 0)  # H' = 0: nothing to choose, so no peak
    return ((entropy * peak).sum(1) / peak.sum(1).clamp(min=1)).mean()


def policy_loss(logp, old_logp, adv):
    """PPO's clipped loss: tokens of responses with adv > 0 become likelier, not too fast."""
    ratio = (logp - old_logp.detach()).exp()  # [B, T]: pi now / pi when it sampled
    gain = torch.min(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv)
    return -(gain.sum(1) / T).mean()


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
        adv = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)  # [B, 1]
        old_logp, entropy = token_stats(policy(tokens), tokens)  # 3. score before any update
        h_agg = aggregate_entropy(entropy).item()
        if step == 1:
            anchor = h_agg  # H*: the policy is to stay as undecided as in the beginning
        for _ in range(2):  # 4. update, twice with the same responses
            logp, entropy = token_stats(policy(tokens), tokens)
            spring = (aggregate_entropy(entropy) - anchor) ** 2  # no more entropy and no less
            loss = policy_loss(logp, old_logp, adv) + beta * spring  # SIREN
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
