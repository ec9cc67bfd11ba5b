"""What trl_siren.py trains on, in the form TRL wants: model, tokenizer, data, reward function."""

from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import siren
from examples import text_env


def toy_tokenizer(task: Any, vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer for a task (see siren.py) that writes every token as one word."""
    ids = {task.decode([token]): token for token in range(vocab)}
    pad, eos = task.decode([task.pad_id]), task.decode(task.eos_ids[:1])
    words = Tokenizer(models.WordLevel(ids, unk_token=pad))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=eos)


def toy_parts(cfg: siren.Config, problems: list[Any] | None = None) -> dict[str, Any]:
    """Keywords of GRPOTrainer for cfg's task, such as toy_env; by default 4096 of its problems."""
    task = siren.load_task(cfg)
    model, problems = task.build_model(), problems or task.train_problems(4096, "trl")
    rows = [{"prompt": task.decode(p.prompt), "answer": p.answer} for p in problems]

    def right(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        # from the ids: TRL's text leaves out <eos>, which tells an answer from a cut-off response
        rules = {"answer_form": task.answer_form, "equal": task.equal}
        pairs = zip(map(task.decode, completion_ids), answer)
        return [float(siren.verify(text, a, **rules)) for text, a in pairs]

    tokenizer = toy_tokenizer(task, model.config.vocab_size)
    parts = {"model": model, "processing_class": tokenizer, "reward_funcs": right}
    return {**parts, "train_dataset": Dataset.from_list(rows)}


def options(cfg: siren.Config) -> dict[str, Any]:
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


def text_parts(model: str, data: str, prompt: str = text_env.PROMPT) -> dict[str, Any]:
    """The same for a language model (folder or hub id) and a .jsonl file of question and answer.

    OSError, ValueError: no such model or file, a line without question or answer, or answers that
    no response could match.
    """
    if "{question}" not in prompt:
        raise ValueError(f"--prompt {prompt!r}: needs {{question}} where the question goes")
    rows = text_env.matchable(text_env.read_rows(data), data)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")

    def to_prompt(row: text_env.Row) -> dict[str, Any]:
        text = prompt.replace("{question}", row.question)
        chat = [{"role": "user", "content": text}]
        return {"prompt": chat if tokenizer.chat_template else text, "answer": row.answer}

    parts = {"model": model, "processing_class": tokenizer, "reward_funcs": right_text}
    return {**parts, "train_dataset": Dataset.from_list([to_prompt(row) for row in rows])}


def right_text(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """siren.verify's reward of TRL's completions, which are texts or lists of messages.

    >>> right_text(["so \\\\boxed{2}", [{"role": "assistant", "content": "2"}]], ["2", "2"])
    [1.0, 0.0]
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(siren.verify(text, a)) for text, a in zip(texts, answer)]
