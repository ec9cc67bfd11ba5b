"""Write data.json, what the two figures of the annotated page show: a language model at work.

    python examples/get_smollm2.py           # the model, see docs/scale.md
    python docs/annotated/make_data.py       # a minute; needed only for another question or model

The model answers a question 24 times. Stored are the logits of the twelve likeliest first tokens,
and the first right answer that has at least MIN_TOKENS tokens: the H' (nats) of each token, and the
likeliest tokens of its nucleus with their q.
The numbers are rounded: the page is computed from them, and not from the model.
"""

import json
import sys
from pathlib import Path

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
    rollout = siren.sample(
        model, [prompt], samples=24, temperature=TEMPERATURE, max_tokens=64,
        eos_ids=[end], pad_id=end,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    responses = rollout.responses()
    texts = [tokenizer.decode(ids) for ids in responses]
    right = [
        siren.verify(text, ANSWER, answer_form=last_number)
        and ids[-1] == end
        and len(ids) >= MIN_TOKENS
        for ids, text in zip(responses, texts)
    ]
    one = rollout.rows(torch.tensor([right.index(True)]))
    with torch.no_grad():
        hidden, head = siren.forward(model, one), model.get_output_embeddings()
        stats = siren.token_stats(hidden, one.tokens, one.mask, TOP_P, TEMPERATURE, head)
        logits, ids = head(hidden[0, 0]).topk(12)
        log_q, options = siren.nucleus(siren.log_softmax(head(hidden[0]), TEMPERATURE), TOP_P)
    length = int(one.mask.sum())
    return {
        "question": QUESTION,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "first": [tokenizer.decode([i]) for i in ids.tolist()],
        "logits": [round(z, 3) for z in logits.tolist()],
        "tokens": [tokenizer.decode([i]) for i in one.tokens[0, :length].tolist()],
        "options": [
            [[tokenizer.decode([i]), round(q, 2)] for i, q in zip(some[:4], share[:4]) if q > 0]
            for some, share in zip(options[:length].tolist(), log_q[:length].exp().tolist())
        ],
        "nucleus_entropy": [
            round(abs(h), 4) for h in stats["nucleus_entropy"][0, :length].tolist()
        ],
    }


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    data = figures(model, AutoTokenizer.from_pretrained(MODEL))
    rows = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in data.items())
    (HERE / "data.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
