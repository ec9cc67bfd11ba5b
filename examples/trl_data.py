"""What trl_siren.py trains on, as TRL wants it: model, tokenizer, data, reward function."""

import importlib

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import siren
import text_env


def load_task(cfg):
    """The task of a siren.Config, "module:name=value,name=value", as siren.Run loads it."""
    module, options = siren.module_and_options(cfg.task)
    return importlib.import_module(module).load(cfg, **options)


def toy_tokenizer(task, vocab):
    """A tokenizer for a task (see toy_env.py) that writes every token as one word."""
    ids = {task.decode([token]): token for token in range(vocab)}
    pad = task.decode([task.pad_id])
    eos = task.decode(task.eos_ids[:1])
    words = Tokenizer(models.WordLevel(ids, unk_token=pad))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=eos)


def toy_parts(cfg, problems=None):
    """Keywords of GRPOTrainer for the task of cfg, such as toy_env; by default 4096 of its
    problems."""
    task = load_task(cfg)
    model = task.build_model()
    problems = problems or task.train_problems(4096, "trl")
    rows = [{"prompt": task.decode(p.prompt), "answer": p.answer} for p in problems]

    def right(completion_ids, answer, **_):
        # from the ids: TRL's text leaves out <eos>, which tells an answer from one cut off
        texts = map(task.decode, completion_ids)
        rules = (task.find_answer, task.equal)
        return [float(siren.verify(text, a, *rules)) for text, a in zip(texts, answer)]

    tokenizer = toy_tokenizer(task, model.config.vocab_size)
    parts = {"model": model, "processing_class": tokenizer, "reward_funcs": right}
    return {**parts, "train_dataset": Dataset.from_list(rows)}


def options(cfg):
    """What siren.py does with this cfg, as options of GRPOConfig: Dr.GRPO, no log."""
    return {
        "per_device_train_batch_size": cfg.prompts * cfg.group_size // cfg.mini_batches,
        "steps_per_generation": cfg.mini_batches,
        "max_steps": cfg.steps * cfg.mini_batches,
        "num_generations": cfg.group_size,
        "max_completion_length": cfg.max_tokens,
        "temperature": cfg.temperature,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "epsilon": cfg.clip_low,
        "epsilon_high": cfg.clip_high,
        "learning_rate": cfg.lr,
        "max_grad_norm": cfg.grad_clip,
        "seed": cfg.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def text_parts(model, data, prompt=text_env.PROMPT):
    """The same for a language model (folder or hub id) and a .jsonl file of question and
    answer.

    OSError, ValueError: no such model or file, a line without question or answer, or answers
    that no response could match.
    """
    rule = "needs {question} where the question goes"
    siren.require("{question}" in prompt, f"--prompt {prompt!r}: {rule}")
    rows = text_env.matchable(text_env.read_rows(data), data)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")

    def to_prompt(row):
        text = prompt.replace("{question}", row.question)
        chat = [{"role": "user", "content": text}]
        return {"prompt": chat if tokenizer.chat_template else text, "answer": row.answer}

    parts = {"model": model, "processing_class": tokenizer, "reward_funcs": right_text}
    return {**parts, "train_dataset": Dataset.from_list([to_prompt(row) for row in rows])}


def right_text(completions, answer, **_):
    """The rewards of TRL's completions, which are texts or lists of messages.

    >>> right_text(["so \\\\boxed{2}", [{"role": "assistant", "content": "2"}]], ["2", "2"])
    [1.0, 0.0]
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    rules = (None, text_env.equal)
    pairs = zip(map(text_env.plain_boxes, texts), answer)
    return [float(siren.verify(text, a, *rules)) for text, a in pairs]
