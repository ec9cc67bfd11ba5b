"""siren.stats_in_chunks with its gradient written out: for flat policies, large vocabularies.

    python research/plugs.py --plug research.fast_stats

siren.py sorts the likeliest tokens of a position until they reach p. Where a nucleus holds
tens of thousands of tokens (an entropy bonus that explodes) that is most of the work. Here a
histogram of the probabilities finds the few tokens at the edge of the nucleus, and only these
are sorted. The gradient is a formula, so only four numbers per token are kept for it.

When it pays (python research/bench.py --only a; 64 tokens, V = 152064, one thread; time
against log-softmax, gather and full entropy alone; results/bench.md): on flat policies, 1.4
against siren.py's 14. On peaked ones there is little between them. Memory is alike, half of
that plain way's.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren

LEAST = -1e9  # the log-probability of a forbidden token, whose logit is -inf: 0 log 0 is 0


def wide(x):
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def nucleus_floor(log_pi, pi, top_p):
    """The nucleus without sorting a vocabulary: {log pi >= floor [n, 1]} without the tokens at
    these rows and columns, which equal the floor but are not needed to reach p.

    log_pi, pi [n, V] -> floor, rows, columns. A histogram of log pi finds the bucket in which
    the mass crosses p; only that bucket is sorted.
    """
    n = len(pi)
    buckets = min(2048, pi.shape[1])
    # 32 nats in all, for beyond there is nothing; fmin sends NaN to the last bucket
    bucket = torch.fmin(log_pi * (-buckets / 32), log_pi.new_tensor(buckets - 1)).long()
    mass = pi.new_zeros(n, buckets).scatter_add_(1, bucket, pi).cumsum(1)
    edge = (mass < top_p).sum(1, keepdim=True).clamp(max=buckets - 1)
    before = mass.gather(1, (edge - 1).clamp(min=0)) * (edge > 0)
    # the tokens in the bucket at the edge, left-aligned in a table and sorted
    rows, columns = (bucket == edge).nonzero(as_tuple=True)
    count = torch.bincount(rows, minlength=n)
    place = torch.arange(len(rows), device=pi.device) - (count.cumsum(0) - count)[rows]
    table = log_pi.new_full((n, max([1, *count.tolist()])), float("-inf"))
    table[rows, place] = log_pi[rows, columns]
    table, order = table.sort(dim=-1, descending=True, stable=True)
    p = table.exp()
    # neither the table's empty places nor forbidden tokens
    inside = (before + p.cumsum(-1) - p < top_p) & (table > 0.9 * LEAST)
    size = inside.sum(1, keepdim=True)
    # where nothing of this bucket is inside, the floor is just above it
    above = table[:, :1].nextafter(table.new_tensor(float("inf")))
    floor = torch.where(size > 0, table.gather(1, (size - 1).clamp(min=0)), above)
    tied, at = ((table == floor) & ~inside).nonzero(as_tuple=True)
    where = torch.zeros_like(order)
    where[rows, place] = columns
    return floor, tied, where[tied, order[tied, at]]


def policy(ctx, x, weight, bias):
    """log pi and pi of a chunk, [n, V]; x is hidden states or, without a weight, logits."""
    if weight is not None:
        x = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
    x = x.to(wide(x))
    log_pi = (x if ctx.temperature == 1 else x / ctx.temperature).log_softmax(-1)
    log_pi = log_pi.clamp_(min=LEAST)
    return log_pi, log_pi.exp()


class TokenStats(torch.autograd.Function):
    """logp, H, H' and |V_p| of N tokens, chunk by chunk; nothing of size [N, V] is kept.

    The backward pass makes each chunk's z = logits / temperature again and applies
        d logp_y / dz_j = [j = y] - pi_j
        d H'     / dz_j = -q_j (log q_j + H')   inside the nucleus, 0 outside
    All but [j = y] is -pi_j times something; g gathers that.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, tokens, top_p, temperature, chunk):
        """Values of x [N, V or D] and tokens [N]."""
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.ties = []  # of each chunk: which tokens equal the floor and are outside
        dtype = wide(x if weight is None else weight)
        logp, entropy, nucleus, floor, scale, shift = x.new_zeros(6, len(x), dtype=dtype)
        size = torch.zeros_like(tokens)
        with torch.autocast(x.device.type, enabled=False):  # it would round to bfloat16
            for rows in torch.arange(len(x), device=x.device).split(chunk):
                log_pi, pi = policy(ctx, x[rows], weight, bias)
                logp[rows] = log_pi.gather(-1, tokens[rows, None])[:, 0]
                entropy[rows] = -torch.linalg.vecdot(pi, log_pi)
                least = torch.full_like(pi[:, :1], 0.9 * LEAST)  # all tokens
                ties = [[], []]
                if top_p < 1:
                    least, *ties = nucleus_floor(log_pi, pi, top_p)
                inside = log_pi >= least
                inside[ties[0], ties[1]] = False
                pi *= inside
                mass = pi.sum(-1)  # pi(V_p)
                size[rows] = inside.sum(-1)
                # -sum of q log q, where log q = log pi - log mass
                h = mass.log() - torch.linalg.vecdot(pi, log_pi) / mass
                choice = size[rows] > 1  # with a single option H' is 0: not nearly, exactly
                nucleus[rows] = torch.where(choice, h, 0.0)
                # for the backward pass: q = scale * pi, and log q + H' = log pi + shift
                scale[rows] = torch.where(choice, 1 / mass, 0.0)
                shift[rows] = torch.where(choice, h - mass.log(), 0.0)
                floor[rows] = least[:, 0]
                ctx.ties.append(ties)
        ctx.save_for_backward(x, weight, bias, tokens, floor, scale, shift)
        ctx.mark_non_differentiable(entropy, size)
        return logp, entropy, nucleus, size

    @staticmethod
    def backward(ctx, of_logp, _, of_nucleus, __):
        """Gradients with respect to x, weight and bias."""
        x, weight, bias, tokens, floor, scale, shift = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        grad_w = None
        grad_b = None
        if ctx.needs_input_grad[1]:
            grad_w = torch.zeros_like(weight, dtype=wide(weight))
        if ctx.needs_input_grad[2]:
            grad_b = torch.zeros_like(bias, dtype=wide(bias))
        with torch.autocast(x.device.type, enabled=False):
            parts = torch.arange(len(x), device=x.device).split(ctx.chunk)
            for rows, ties in zip(parts, ctx.ties):
                log_pi, pi = policy(ctx, x[rows], weight, bias)
                g = torch.zeros_like(pi)
                if of_nucleus is not None:
                    inside = log_pi >= floor[rows, None]
                    inside[ties[0], ties[1]] = False
                    g = log_pi.add_(shift[rows, None]).mul_((of_nucleus * scale)[rows, None])
                    g *= inside
                if of_logp is not None:
                    g += of_logp[rows, None]
                g = g.mul_(pi).neg_()
                if of_logp is not None:
                    g.scatter_add_(1, tokens[rows, None], of_logp[rows, None])
                if ctx.temperature != 1:
                    g /= ctx.temperature
                to_x = g if weight is None else g.to(weight.dtype) @ weight
                grad_x[rows] = to_x.to(x.dtype)
                if grad_w is not None:
                    grad_w += g.T @ x[rows].to(g.dtype)  # summed over the chunks in float32
                if grad_b is not None:
                    grad_b += g.sum(0)
        if grad_w is not None:
            grad_w = grad_w.to(weight.dtype)
        if grad_b is not None:
            grad_b = grad_b.to(bias.dtype)
        return grad_x, grad_w, grad_b, None, None, None, None


def stats_in_chunks(hidden, head, tokens, top_p, temperature, chunk=0):
    """siren.stats_in_chunks, with its arguments; the head is a torch.nn.Linear or the like.
    Without a head (None), `hidden` is the logits themselves, [N, V].

    >>> stats = stats_in_chunks(torch.zeros(1, 4), None, torch.tensor([2]), 0.5, 1.0)
    >>> stats["logp"], stats["nucleus_entropy"]  # log 1/4; two equal options: log 2
    (tensor([-1.3863]), tensor([0.6931]))
    """
    weight = None if head is None else head.weight
    bias = getattr(head, "bias", None)
    if not chunk:
        vocab = hidden.shape[-1] if weight is None else len(weight)
        most = 2**21 if hidden.device.type == "cpu" else 2**26  # logits, as in siren.py
        chunk = max(1, most // vocab)
    values = TokenStats.apply(hidden, weight, bias, tokens, top_p, temperature, chunk)
    return dict(zip(("logp", "entropy", "nucleus_entropy", "nucleus_size"), values))


def plug():
    """What `--plug research.fast_stats` does."""
    siren.stats_in_chunks = stats_in_chunks
