"""Write data.json, what the two figures of the annotated page show: a language model at work.

    python examples/get_smollm2.py         # the model, see docs/scale.md
    python docs/annotated/make_data.py     # needed only for another question or model

The model answers a question 24 times. Stored are the logits of the twelve likeliest first
tokens, and the first right answer that has at least MIN_TOKENS tokens: the H' (nats) of each
token, and the likeliest tokens of its nucleus with their q. The numbers are rounded: the page
is computed from them, and not from the model.

The stored file was made with an earlier sampler, which drew other random numbers. So this
script now finds another answer, and the captions in notes.md would have to be written again.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import siren  # noqa: E402

MODEL = ROOT / "models" / "smollm2-135m"
QUESTION = "Anna has 3 boxes of 12 pencils. How many pencils does she have?"
ANSWER, MIN_TOKENS, TEMPERATURE, TOP_P = "36", 40, 0.7, 0.8


def last_number(text):
    """The answer of a response: its last number."""
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return digits[-1] if digits else None


def figures(model, tokenizer):
    """The content of data.json."""
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    end = tokenizer.eos_token_id
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    cfg = siren.Config(max_tokens=64, top_p=TOP_P, temperature=TEMPERATURE)
    task = SimpleNamespace(pad_id=end, eos_ids=[end])
    problem = SimpleNamespace(prompt=prompt)
    rollout = siren.sample(model, task, [problem], cfg, "annotated", 24, TEMPERATURE)
    responses = rollout.responses()
    texts = [tokenizer.decode(ids) for ids in responses]
    right = [
        siren.verify(text, ANSWER, last_number) and ids[-1] == end and len(ids) >= MIN_TOKENS
        for ids, text in zip(responses, texts)
    ]
    one = rollout.rows(torch.tensor([right.index(True)]))
    with torch.no_grad():
        stats = siren.score(model, one, cfg)
        logits = model.get_output_embeddings()(siren.forward(model, one)[0])  # [T, V]
        first, ids = logits[0].topk(12)
        log_pi = (logits / TEMPERATURE).log_softmax(-1)
        q = siren.nucleus(log_pi, TOP_P)[:, :4].exp()  # the likeliest first
        options = log_pi.topk(4).indices
    length = int(one.mask.sum())
    return {
        "question": QUESTION,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "first": [tokenizer.decode([i]) for i in ids.tolist()],
        "logits": [round(z, 3) for z in first.tolist()],
        "tokens": [tokenizer.decode([i]) for i in one.tokens[0, :length].tolist()],
        "options": [
            [[tokenizer.decode([i]), round(x, 2)] for i, x in zip(tokens, shares) if x > 0]
            for tokens, shares in zip(options[:length].tolist(), q[:length].tolist())
        ],
        "nucleus_entropy": [
            round(abs(h), 4) for h in stats["nucleus_entropy"][0, :length].tolist()
        ],
    }


if __name__ == "__main__":
    argparse.ArgumentParser("make_data.py", description=__doc__.splitlines()[0]).parse_args()
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    data = figures(model, AutoTokenizer.from_pretrained(MODEL))
    rows = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in data.items())
    (HERE / "data.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
