"""A language model of two layers that is called as one of transformers is, in plain PyTorch.

The graders of exercise 11 use it, since importing transformers takes seconds. Its cache has
the methods of transformers' DynamicCache that a sampler may need; it takes that one as well.
"""

from types import SimpleNamespace

import torch


class Cache:
    """Keys and values of the past, a pair for each layer."""

    def __init__(self):
        self.layers = {}

    def update(self, keys, values, layer, *_, **__):
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys = torch.cat([old_keys, keys], 2)
            values = torch.cat([old_values, values], 2)
        self.layers[layer] = (keys, values)
        return keys, values

    def get_seq_length(self, layer=0):
        return self.layers[layer][0].shape[2] if self.layers else 0

    def change(self, function):
        self.layers = {i: tuple(map(function, pair)) for i, pair in self.layers.items()}

    def batch_select_indices(self, indices):
        self.change(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats):
        self.change(lambda x: x.repeat_interleave(repeats, 0))

    def reorder_cache(self, indices):
        self.batch_select_indices(indices)


class TinyModel(torch.nn.Module):
    """A random transformer with learned positions: wrong positions or attention change it."""

    def __init__(self, vocab=32, width=16, heads=2, context=64, sharp=1.0, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape, scale=0.5):
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        self.heads = heads
        self.tokens = weight(vocab, width, scale=1.0)
        self.places = weight(context, width, scale=0.7)
        self.mixers = torch.nn.ParameterList(weight(width, 3 * width, scale=0.4) for _ in "ab")
        self.outputs = torch.nn.ParameterList(weight(width, width, scale=0.4) for _ in "ab")
        self.head = weight(width, vocab, scale=sharp * 0.4)

    @property
    def device(self):
        return self.head.device

    @property
    def dtype(self):
        return self.head.dtype

    @property
    def config(self):
        """For those who ask: with transformers, which this module itself does not import."""
        from transformers import Qwen2Config

        vocab, width = self.tokens.shape
        sizes = {"num_hidden_layers": 2, "num_attention_heads": self.heads}
        return Qwen2Config(vocab_size=vocab, hidden_size=width, **sizes)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        **_,
    ):
        cache = Cache() if past_key_values is None else past_key_values
        past = cache.get_seq_length()
        rows, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(past, past + length).expand(rows, -1)
        if attention_mask is None:
            attention_mask = torch.ones(rows, past + length)
        x = self.tokens[input_ids] + self.places[position_ids]
        columns = torch.arange(past + length)
        earlier = columns[None, :] <= torch.arange(past, past + length)[:, None]
        seen = (
            earlier & attention_mask.bool()[:, None, None, :]
        )  # [rows, 1, length, past + length]
        for layer, (mixer, output) in enumerate(zip(self.mixers, self.outputs)):
            x = x + self.attention(normed(x) @ mixer, seen, cache, layer) @ output
            x = x + torch.tanh(normed(x))
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = normed(x) @ self.head
        return SimpleNamespace(logits=logits, past_key_values=cache if use_cache else None)

    def attention(self, mixed, seen, cache, layer):
        rows, length, _ = mixed.shape
        parts = mixed.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        keys, values = cache.update(parts[1], parts[2], layer)
        weights = parts[0] @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5
        weights = weights.masked_fill(~seen, -1e9).softmax(-1)
        return (weights @ values).transpose(1, 2).reshape(rows, length, -1)


def normed(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:])
