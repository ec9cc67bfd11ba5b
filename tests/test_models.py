"""Which models can be trained: text_env tries them before anything is trained, and reads each
prompt once where it can. On tiny random models, made by research/families.py."""

import contextlib
import functools
import io
import re

import pytest
import torch
from common import model_with_absolute_positions, small_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import siren
import text_env
from research import families
from research.families import LAYERS, PAGE, PROMPTS, TOKENS, build, judge

CFG = siren.Config(max_tokens=TOKENS, device="cpu")
RIGHT = {  # family: is a prompt read once for all of its responses?
    "llama": True,
    "qwen2": True,
    "gpt_neox": True,
    "phi3": True,
    "mpt": False,  # a bias that grows with the distance in the row
    "bloom": False,
    "gpt_neo": False,  # windows that its cache knows nothing of
    "mistral": False,  # windows
    "qwen3_next": False,  # linear attention and attention
    "jamba": False,
    "falcon_h1": False,
    "mamba": False,
    "minimax": False,  # a hybrid whose cache has a class of its own
    "minimax_m3_vl_text": True,
}
REFUSED = {
    "rwkv": "sampling and scoring differ by",
    "moshi": "sampling and scoring differ by",
    "bert": "its logits and its head's differ by",
    "bart": "a row with padding and without differ by",
    "gemma2": "its logits and its head's differ by",
    "gemma4_unified_assistant": "inputs_embeds and shared_kv_states cannot be None",
    "musicgen": "transformers can't build it: 'MusicgenConfig' object has no attribute",
    "gemma4_assistant": "transformers can't build it: The set of layer types",
    "cohere": "its logits and its head's differ by",
}


def try_model(model, prompts=PROMPTS, cfg=CFG):
    """What is said while a model is tried."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        text_env.try_model(model, "m", prompts, cfg)
    return said.getvalue()


def roll(model, samples=4, tokens=9):
    """Responses of several lengths to four prompts, of which two differ in padding alone."""
    prompts = [[3, 4, 5], [0, 0, 6, 7, 8], [6, 7, 8], [9]]
    task = families.SimpleNamespace(eos_ids=[*range(0, 96, 6)], pad_id=0)
    problems = [families.SimpleNamespace(prompt=prompt) for prompt in prompts]
    cfg = siren.Config(max_tokens=tokens)
    rollout = siren.sample(model, task, problems, cfg, "1", samples, 1.0)
    assert len(set(rollout.mask.sum(1).tolist())) > 3
    return rollout


def llama(attention="sdpa"):
    """A random Llama that is far from uniform."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 96}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, attn_implementation=attention)).eval()
    for parameter in model.parameters():
        parameter.data *= 4
    return model


# ---------------------------------------------------------------------------------- families
@pytest.mark.slow
@pytest.mark.parametrize("family", RIGHT)
def test_families_that_are_right(family):
    found = judge(family)
    assert found["verdict"] == "right", found
    assert found["gap"] <= 1e-4 and found["once"] == RIGHT[family]
    assert found["entropy"] > 1  # else a mistake would hardly be seen


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused(family):
    found = judge(family)
    assert found["verdict"] == "refused" and REFUSED[family] in found["reason"]
    assert "\n" not in found["reason"]


def test_a_hybrid_of_recurrent_layers_and_attention():
    """Its states are repeated for a prompt's responses, and leave with the rows that end."""
    found = judge("qwen3_5_text")
    assert found["verdict"] == "right" and not found["once"]


@pytest.mark.parametrize("last", ["full_attention", "linear_attention"])
def test_a_hybrid_whose_cache_has_a_class_of_its_own(last, monkeypatch):
    """MiniMax: its states follow the rows as those of other hybrids do, in both orders of its
    layers and with prompts of several blocks."""
    kinds = LAYERS if last == LAYERS[-1] else LAYERS[::-1]
    monkeypatch.setitem(families.OVERRIDES, "minimax", {"layer_types": kinds, "block_size": 2})
    model = build("minimax")
    with pytest.raises(ValueError, match="MiniMax uses cache of its own"):
        roll(model)
    assert "reads a prompt again for each response" in try_model(model)
    rollout = roll(model)
    assert not rollout.prompt_mask.all(), "some prompts are padded"
    logp = siren.score(model, rollout, CFG)["logp"]
    assert (logp - rollout.logp)[rollout.mask].abs().max() <= 1e-4
    for i, response in enumerate(rollout.responses()):
        prompt = rollout.prompt[i][rollout.prompt_mask[i]].tolist()
        expected = families.alone(model, prompt, response)
        assert (rollout.logp[i, : len(response)] - expected).abs().max() <= 1e-4


def test_the_page_has_a_verdict_for_each_architecture():
    rows = re.findall(r"^\| ([\w-]+) \| (right|refused) \|", PAGE.read_text(), re.M)
    assert [family for family, _ in rows] == [*families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    verdicts = dict(rows)
    assert {verdicts[family] for family in RIGHT} == {"right"}
    assert {verdicts[family] for family in REFUSED} == {"refused"}


def test_a_tiny_model_that_could_be_built_is_a_fault_of_this_file():
    found = families.judge_folder("llama", "no such layer")
    assert found["verdict"] == "broken" and "has no weights for" in found["reason"]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("musicgen", "Multiple valid text configs were found"),  # said before it is built
        ("gemma4_assistant", "The set of layer types producing a cache is different"),
    ],
)
def test_a_folder_that_transformers_cannot_build_is_refused(family, why, tmp_path, capsys):
    folder = tmp_path / "model"
    families.tiny_config(family).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate("?abcdefgh")}, "?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"question": "{x}", "answer": "1"}}\n' for x in "abcdefgh"))
    flags = [f"--model={folder}", f"--data={data}", f"--out={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stop:
        siren.main(flags)
    said = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("text_env: ")]
    assert stop.value.code == 2
    assert len(said) == 1 and said[0].startswith("siren.py: ") and why in said[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "nothing has been trained"


# ---------------------------------------------------------------------------------- the trial
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_cache_and_hide_padding_are_taken(dtype):
    for model in (small_model(), model_with_absolute_positions()):
        state = torch.get_rng_state()
        assert try_model(model.to(dtype)) == ""
        assert torch.equal(state, torch.get_rng_state()), "the run's random numbers stay"
        assert hasattr(model, "read_rollout")


@pytest.mark.parametrize(
    ("ignored", "what"),
    [
        (["position_ids"], "a row with padding and without"),
        (["past_key_values", "attention_mask"], "sampling and scoring"),
    ],
)
def test_a_model_that_ignores_positions_or_its_cache_is_refused(ignored, what):
    model = model_with_absolute_positions()

    def leave_out(module, args, given):
        return args, {name: x for name, x in given.items() if name not in ignored}

    model.transformer.register_forward_pre_hook(leave_out, with_kwargs=True)
    with pytest.raises(ValueError, match=f"m: a GPT.* can't be trained: {what} differ by"):
        try_model(model)
    assert not hasattr(model, "read_rollout")


def test_scores_that_are_not_finite_are_refused():
    model = small_model()
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: out * torch.nan)
    with pytest.raises(ValueError, match="differ by nan nats"):
        try_model(model)


def test_whatever_a_model_raises_is_one_line():
    model = small_model()

    def fail(*_):
        raise KeyError("no\nsuch layer")

    model.base_model.register_forward_pre_hook(fail)
    with pytest.raises(
        ValueError, match="m: a Qwen2ForCausalLM can't be trained: 'no"
    ) as error:
        try_model(model)
    assert "\n" not in str(error.value)


def test_a_head_that_does_more_is_seen_in_the_numbers():
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, out: 1.01 * out)
    try_model(model)  # siren.py calls the head, so what it does counts
    plain = model.forward

    def scaled(*args, **how):
        out = plain(*args, **how)
        out.logits = 1.1 * out.logits
        return out

    model.forward = functools.wraps(plain)(scaled)
    with pytest.raises(ValueError, match="its logits and its head's differ by"):
        try_model(model)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_change_beyond_a_limit(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
        rope |= {"original_max_position_embeddings": 16}
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64 if kind == "longrope" else 16,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 9
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    assert try_model(model, prompts, siren.Config(max_tokens=12, device="cpu")) == ""
    rule = "change beyond 16 tokens, prompt and response have up to 17; lower --max"
    with pytest.raises(ValueError, match=rule):
        try_model(model, prompts, siren.Config(max_tokens=13, device="cpu"))
    # why: what the cache holds is no longer what a new pass computes
    del model.read_rollout
    gaps = text_env.gaps_of(model, [5, 6, 7, 8, 9, 10, 11] * 2, 6, CFG)
    assert gaps["sampling and scoring"] > 1e-3  # what text_env allows


# ------------------------------------------------------------------------ prompts read once
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 6), slice(1, None, 3)], ids=str)
@pytest.mark.parametrize("room", [1024, 12])  # 12: some groups need several rows
def test_prompts_read_once_change_rounding_only(attention, rows, room, monkeypatch):
    monkeypatch.setattr(text_env, "ROW", room)
    model = llama(attention)
    rollout = roll(model).rows(rows)
    found = []
    for once in (False, True):
        if once:
            model.read_rollout = functools.partial(text_env.read_prompts_once, model)
        model.zero_grad()
        hidden = siren.forward(model, rollout)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        (hidden * weights)[rollout.mask].sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((hidden.detach()[rollout.mask], torch.cat(grads)))
    (plain, plain_grad), (shared, shared_grad) = found
    assert plain.shape == (int(rollout.mask.sum()), 16)
    assert torch.allclose(plain, shared, atol=2e-5)
    assert (plain_grad - shared_grad).norm() < 1e-5 * plain_grad.norm()


def test_a_step_is_the_same_and_reads_each_token_once():
    model = llama()
    rollout = roll(model)
    cfg = siren.Config(prompts=4, mini_batches=1, group_size=4, max_tokens=9)
    adv = torch.tensor([0.5, -0.5, -0.5, 0.5] * 4)
    weights = list(model.parameters())
    run = families.SimpleNamespace(cfg=cfg, model=model, weights=weights, anchor=1.0)
    run.optimizer = torch.optim.AdamW(weights, lr=0.0)
    read = []
    layer = model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[:2].numel()))
    found = []
    for once in (False, True):
        if once:
            model.read_rollout = functools.partial(text_env.read_prompts_once, model)
        read.clear()
        with torch.no_grad():
            old = siren.score(model, rollout, cfg)
        found.append(siren.update(run, rollout, old["logp"], adv))
    prompts = rollout.prompt_mask[::4].sum()
    assert sum(read) == 2 * int(prompts + rollout.mask.sum())  # once to score, once to update
    assert found[0].keys() == found[1].keys() and found[0]["grad_norm"] > 0
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_change_rounding_only(recompute):
    """Parts of the rows, computed again in the backward pass."""
    model = llama()
    model.read_rollout = functools.partial(text_env.read_prompts_once, model)
    rollout = roll(model)
    if recompute:
        text_env.recompute_layers(model)
    gradients = []
    for size in (64, 3):
        cfg = siren.Config(micro_batch_size=size)
        model.zero_grad()
        siren.score(model, rollout, cfg)["nucleus_entropy"].sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_long_responses_need_several_rows():
    model = llama()
    lengths = []
    layer = model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    ids = torch.full((8, 3), 5)
    tokens = torch.full((8, 300), 6)
    rollout = siren.Rollout(ids, ids > 0, tokens, tokens > 0, tokens.float())
    text_env.read_prompts_once(model, rollout)
    assert lengths == [903, 903, 603]


def test_a_mask_that_a_model_does_not_take_is_seen():
    """Forced on a model with windows, reading prompts once would be wrong."""
    model = build("mistral")
    assert "reads a prompt again for each response" in try_model(model)
    assert text_env.gaps_of(model, [5, 6, 7] * 5, 6, CFG)["once"] > 1e-3
    model = build("mpt")  # its config does not tell
    assert "reads a prompt again for each response" in try_model(model)
    assert not hasattr(model, "read_rollout")


def test_windows_that_only_a_full_row_passes():
    """A prompt and a response are shorter than the window, but the responses to a prompt
    together are not; GPT-Neo counts columns, and its cache knows nothing of its windows."""
    config = GPTNeoConfig(
        vocab_size=96,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["local"], 2]],
        window_size=40,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 9
    assert max(map(len, PROMPTS)) + TOKENS < 40 < text_env.ROW
    assert "reads a prompt again for each response" in try_model(model)
