"""Which architectures can be trained: every causal one that transformers knows, made tiny.

    python research/families.py                     # about half an hour; writes docs/models.md
    python research/families.py --only llama mamba  # prints these alone

A tiny random model of each goes through what text_env does with a model before training. A
model that passes is then judged by something slower: the log-probabilities of what siren.py's
sampler drew, with prompts of several lengths, against a pass over each row alone, without
padding, cache or shared prompts, whose logits come from the model itself.

    right    equal to 1e-4 nats, with gradients that are finite and not all 0
    refused  text_env says why in one line
    broken   neither: a fault of text_env or of this file

A model that transformers itself can't build is a folder with a config and no weights. It is
refused if text_env, which reads that folder, says in one line what transformers said. Each
architecture has a process of its own, with a time limit.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
import text_env
from research.tools import Parser, one_line, run_tool

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
SECONDS = 300  # for an architecture
MOST = 1e-4  # nats between what is sampled, what is scored and what is read alone
VOCAB = 96
PROMPTS = [[5, 6, 7], list(range(8, 19)), list(range(19, 26))]
TOKENS = 12  # of a response: prompts and responses pass windows of 8 tokens
# the tiny value of a config's whole numbers, by name; the first pattern that fits counts
SMALL = {
    r"vocab_size|decoder_vocab_size|.*_vocab_size|vocab_offset|unpadded_vocab_size": VOCAB,
    r"type_vocab_size|task_type_vocab_size": 2,
    r"hidden_size|d_model|n_embd|dim_model|embed_dim|emb_dim|embedding_(size|dim)": 64,
    r"word_embed_proj_dim|attention_hidden_size|hidden_size_global|lru_width": 64,
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|depth": 4,
    r"(num_)?(encoder_|decoder_|swa_)?(attention_)?heads|n_heads?|num_attention_heads": 4,
    r"num_(decoder|encoder)_attention_heads|swa_num_attention_heads|num_query_groups": 4,
    r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads": 2,
    r"head_dim|dim_head|d_head|kv_channels|swa_head_dim|attention_head_(dim|size)": 16,
    r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|dim_ff|dff|d_inner|mlp_dim": 64,
    r"moe_num_experts|num_(local_)?experts|n_routed_experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k": 2,
    r"topk_group|n_group|num_expert_group": 1,
    r"(q|kv|o)_lora_rank|adapter_rank|hc_lowrank|gated_norm_rank|laurel_rank": 16,
    r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim|rotary_dim": 16,
    r"qk_head_dim": 32,
    r"index_n_heads|linear_num_(key|value)_heads|linear_num_heads": 4,
    r"linear_(key_|value_)?head_dim": 16,
    r"sliding_window(_size)?|attention_(chunk|window)_size|local_attention": 8,
    r"mamba_d_state|state_size|ssm_state_size|mamba_dt_rank|time_step_rank": 8,
    r"mamba_(d_head|head_dim|headdim)": 32,
    r"mamba_n(um)?_heads|n_mamba_heads": 4,
    r"(mamba_)?chunk_size": 4,
}
LAYERS = ["linear_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "hybrid"] * 2
MIXED = ["sliding_attention", "full_attention"] * 2
TEXT = """# Which models can be trained

Made by `python research/families.py`: a tiny random model of each of the {n} causal
architectures of transformers {version}, through what [text_env.py](../text_env.py) does with
a model before training. It compares the logits of a model with those of its head alone, the
log-probabilities of a few sampled tokens with those of the scoring pass, and a padded row with
the same row alone. What differs by more than .001 nats in the mean is refused in one line,
before anything is trained. In bfloat16, whose rounding alone makes .03, the bar of the last
two is .08: of the models refused here XLNet passes it. Where prompts that are read once for
all of their responses do not give the same, they are read again for each.

**{right} are right.** What siren.py's sampler drew, what is scored, and a plain pass over each
row alone, without padding and cache, differ by at most {gap:.0e} nats, and the gradients are
finite: float32, prompts of 3 to 11 tokens, responses of at most 12 tokens, windows of 8
tokens. Of these models, {once} read a prompt once for all of its responses. The others have
windows, indexed attention, recurrent states or biases that need a row for each response:
slower, and right. (A Mistral without a window reads once, too.) In bfloat16 the three pure
Mambas are refused, since a layer of theirs mixes types.
**{refused} are refused**, {unbuilt} of them because transformers itself can't build them here.

A tiny random model shows that the passes fit together, not that a large one fits into memory
or learns. Positions that change beyond a limit (longrope, dynamic) are right up to it; a run
whose prompts and responses can be longer is refused. Some architectures of the same name come
with a scaled or capped head or without one, so a model may be refused where its architecture
is right.

| architecture | | prompts, or why |
|---|---|---|
"""
# what some need besides: layers of each kind among four, numbers that must fit each other
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16}
INDEXER |= {"indexer_budget": 4, "indexer_compress_ratio": 2}
ADAPTER = {"adapter_in_dim": 64, "adapter_out_dim": 64}
NO_EXTRA = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
DEFAULTS = {"gemma4_assistant": {"text_config": NO_EXTRA}}  # its own defaults break its rules
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LAYERS},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full", "is_decoder": True},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"pyramid_num_routed": [-1, -1, 2, 4]} | ADAPTER,
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3": {"text_config": {"layer_types": MIXED}},
    "gemma3_text": {"layer_types": MIXED},
    "gemma3n": {"text_config": {"layer_types": MIXED, "num_kv_shared_layers": 0}},
    "gemma3n_text": {"layer_types": MIXED, "num_kv_shared_layers": 0},
    "gemma4": {"text_config": {"layer_types": MIXED}},
    "gemma4_assistant": {"text_config": {"layer_types": MIXED, "num_kv_shared_layers": 4}},
    "gemma4_text": {"layer_types": MIXED},
    "gemma4_unified": {"text_config": {"layer_types": MIXED}},
    "gemma4_unified_assistant": {
        "text_config": {"layer_types": MIXED, "num_kv_shared_layers": 2}
    },
    "gemma4_unified_text": {"layer_types": MIXED},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": LAYERS},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": LAYERS},
    "kolibri1": {"layer_types": MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID, "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": HYBRID, "attention_hidden_size": 128},
    "zaya": {"num_experts_per_tok": 1},
}


def shrink(config: Any) -> dict[str, Any]:
    """The arguments with which a config of this kind is tiny."""
    sizes = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None) if name.endswith("_config") else None
        if hasattr(part, "to_dict"):
            sizes[name] = shrink(part)
        elif isinstance(value, int) and not isinstance(value, bool):
            fits = [small for rule, small in SMALL.items() if re.fullmatch(rule, name)]
            if fits and value > 0:
                sizes[name] = fits[-1] if "type_vocab" in name else fits[0]
            elif name.endswith("_token_id") and name[:3] in ("eos", "bos", "pad"):
                sizes[name] = {"eos": 1, "bos": 2, "pad": 0}[name[:3]]
    if "kv_lora_rank" in sizes:  # latent attention: as many keys as heads
        sizes["num_key_value_heads"] = 4
    return sizes


def merge(sizes: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """sizes with those of the family in their place; None takes one away."""
    merged = dict(sizes)
    for name, value in own.items():
        deeper = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if deeper else value
    return {name: value for name, value in merged.items() if value is not None}


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a tiny model of the family."""
    kind = CONFIG_MAPPING[family]
    own = DEFAULTS.get(family, {})
    sizes = merge(shrink(kind(**own)), own)
    return kind(**merge(sizes, OVERRIDES.get(family, {})))


def build(family: str) -> torch.nn.Module:
    """A tiny model, whose random weights are large enough for its policy to be far from
    uniform: a mistake must be seen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return model


@torch.no_grad()
def alone(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The log-probabilities of a response by a single pass, in the plainest way."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def judge_folder(family: str, why: str) -> dict[str, Any]:
    """What text_env says of a folder with a model that transformers can't build, and why."""
    with TemporaryDirectory() as folder:
        tiny_config(family).save_pretrained(folder)
        save_file({}, Path(folder, "model.safetensors"))
        try:
            text_env.read_model(folder)
            said = "nothing"
        except ValueError as error:
            said = str(error)
    if said == f"model={folder}: AutoModelForCausalLM: {why}; give {text_env.MODEL_FORMS}":
        reason = f"transformers can't build it: {why}"
        return {"verdict": "refused", "reason": reason, "unbuilt": True}
    return {"verdict": "broken", "reason": f"not built: {why}; text_env says: {said}"}


def judge(family: str) -> dict[str, Any]:
    """What becomes of a tiny model of the family."""
    try:
        model = build(family)
    except Exception as error:  # whatever a model may raise
        why = str(error).strip().partition("\n")[0].strip(" .") or type(error).__name__
        return judge_folder(family, why)
    cfg = siren.Config(max_tokens=TOKENS, device="cpu")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            text_env.try_model(model, family, PROMPTS, cfg)
    except ValueError as error:
        return {"verdict": "refused", "reason": str(error).removeprefix(f"model={family}: ")}
    task = SimpleNamespace(eos_ids=[1, 3], pad_id=0)
    problems = [SimpleNamespace(prompt=prompt) for prompt in PROMPTS]
    rollout = siren.sample(model, task, problems, cfg, "judge", 4, 1.0)
    now = siren.score(model, rollout, cfg)
    gap = 0.0
    for i, response in enumerate(rollout.responses()):
        expected = alone(model, PROMPTS[i // 4], response)
        for logp in (rollout.logp[i], now["logp"][i].detach()):
            gap = max(gap, (logp[: len(response)] - expected).abs().max().item())
    (now["logp"].sum() + now["nucleus_entropy"].sum()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    trains = any(grad.any() for grad in grads) and all(grad.isfinite().all() for grad in grads)
    found = {"once": hasattr(model, "read_rollout"), "gap": gap, "reason": ""}
    found["entropy"] = now["entropy"][rollout.mask].mean().item()
    if not (gap <= MOST and trains):
        reason = f"{gap:.2g} nats apart; gradients there and finite: {trains}"
        return found | {"verdict": "broken", "reason": reason}
    return found | {"verdict": "right"}


def in_a_process(family: str) -> dict[str, Any]:
    """judge(family) in a process of its own, so that a crash or a hang is a verdict."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(judge, (family,)).get(SECONDS)
        except multiprocessing.TimeoutError:
            return {"verdict": "broken", "reason": f"no verdict within {SECONDS} seconds"}
        except Exception as error:  # of judge
            return {
                "verdict": "broken",
                "reason": f"{type(error).__name__}: {one_line(error)}",
            }


def page(found: dict[str, dict[str, Any]]) -> str:
    """docs/models.md."""
    counts = Counter(row["verdict"] for row in found.values())
    text = TEXT.format(
        version=version("transformers"),
        n=len(found),
        right=counts["right"],
        refused=counts["refused"],
        unbuilt=sum(row.get("unbuilt", False) for row in found.values()),
        once=sum(row.get("once", False) for row in found.values()),
        gap=max(row.get("gap", 0.0) for row in found.values()),
    )
    for family, row in found.items():
        how = "read once" if row.get("once") else "read for each response"
        note = how if row["verdict"] == "right" else row["reason"].replace("|", " ")
        text += f"| {family} | {row['verdict']} | {note} |\n"
    return text


def command(argv: list[str] | None) -> None:
    """Judge the families, print each verdict, and write the page of all."""
    parser = Parser("families.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    given = parser.parse_args(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    for family in given.only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found[family] = in_a_process(family)
        print(f"{family:26}", *found[family].values(), flush=True)
    if not given.only:
        PAGE.write_text(page(found))
        print(f"wrote {PAGE}")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes as run_tool says."""
    return run_tool("families.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
