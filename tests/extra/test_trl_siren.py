"""Tests of examples/trl_siren.py, SIREN on TRL's GRPOTrainer.

    pip install -r requirements-examples.txt && python -m pytest -q tests/extra

The main one trains with TRL, real sampling included, and records what was sampled. An oracle
then repeats the run from the definitions: float64, one response at a time without any padding,
the whole mini-batch under one plain autograd, SGD. Weights and logged values must agree.

    python tests/extra/test_trl_siren.py FOLDER CASE...    # what torchrun starts twice
"""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, MixtralConfig, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

import siren
from examples import trl_data, trl_siren
from examples.trl_siren import SirenGRPOConfig, SirenGRPOTrainer
from research.compare_trl import RESULT, compare
from toy_env import ToyWorld

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
STEPS = 4  # of which two share a rollout
ROWS = 16  # responses of a step
BUDGET = 12  # tokens of a response
LR = 0.03
BETA = 2.0
LORA = LoraConfig(r=4, target_modules="all-linear", lora_alpha=16)
# micro: responses in a backward pass of one process. In float64 an exact method is off by
# rounding alone, 1e-16; in float32 that is 1e-7, unless it moves a token over the edge of a
# nucleus
CASES = {
    "one-micro-batch": {"micro": 16},
    "one-micro-batch-checkpointed": {"micro": 16, "checkpointing": True},
    "four-micro-batches": {"micro": 4, "temperature": 0.8},
    "four-micro-batches-checkpointed": {"micro": 4, "checkpointing": True},
    "four-micro-batches-float32": {"micro": 4, "dtype": torch.float32},
    "bonus": {"micro": 8, "regularizer": "bonus", "siren_beta": 0.5, "entropy_chunk": 0},
    "given-anchor": {"micro": 8, "anchor": 0.7},
    "no-peak-mask": {"micro": 4, "peak_quantile": 0.0},
    "lora": {"micro": 4, "checkpointing": True, "lora": LORA},
    "processes": {"micro": 4, "temperature": 1.2},
    "processes-checkpointed": {"micro": 4, "checkpointing": True},
    "processes-float32": {"micro": 4, "dtype": torch.float32},
    "processes-sharded": {"micro": 4, "checkpointing": True, "fsdp": True},
    "processes-sharded-untied": {"micro": 4, "fsdp": True, "untied": True},
}
F64 = {"dtype": torch.float64}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
MODEL = ("lora", "untied", "dtype")  # the cases' options that are not trl's
TOGETHER = [name for name in CASES if name.startswith("processes")]
KEPT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


class Recorder(SirenGRPOTrainer):
    """Keeps the micro-batches that its loss saw."""

    seen = ()

    def _compute_loss(self, model, inputs):
        if self.model.training:
            self.seen += ({key: inputs[key].clone() for key in KEPT},)
        return super()._compute_loss(model, inputs)


def config(folder, micro, processes=1, checkpointing=False, **options):
    """4 steps of SGD, of which every second is off-policy: a rollout has two mini-batches."""
    accumulation = ROWS // micro // processes
    standard = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": 2 * accumulation,
        "num_generations": 4,
        "max_completion_length": BUDGET,
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # no clipping
        "max_steps": STEPS,
        "siren_beta": BETA,
        "entropy_chunk": 13,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": checkpointing,
        "output_dir": str(folder),
    }
    return SirenGRPOConfig(**{**standard, **options})


def share_even(completion_ids, **_):
    """A reward that tells any two responses apart: few toy answers are right."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def base_model(untied=False, dtype=torch.float32):
    """The toy's base model; if wanted, with a head of its own instead of the embedding."""
    model = ToyWorld().build_model()
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model.to(dtype)


def parts(lora=None, **model):
    """The toy with prompts of 4 to 7 terms: they need padding, and some responses are cut."""
    world, rng = ToyWorld(), np.random.default_rng(0)
    lengths = [6, 7, 5, 6, 4] * 8
    problems = [world.problem(rng.integers(1, 9, length).tolist()) for length in lengths]
    toy = trl_data.toy_parts(siren.Config(), problems)
    toy |= {"model": base_model(**model), "reward_funcs": share_even}
    return toy | ({"peft_config": lora} if lora else {})


def trainables(model):
    named = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in named}


def run(folder, micro, processes=1, fsdp=False, **options):
    """Train; return the trainer and what the oracle needs."""
    model = {key: options.pop(key) for key in MODEL if key in options}
    AcceleratorState._reset_state(reset_partial_state=False)
    args = config(folder, micro, processes, **options)
    # accelerate shards on GPUs alone; told that these are GPUs, it does the same on the CPU
    told = DistributedType.MULTI_GPU if fsdp else PartialState().distributed_type
    PartialState._shared_state["distributed_type"] = told
    os.environ["ACCELERATE_USE_FSDP"] = str(fsdp).lower()
    os.environ |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ |= {
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    trainer = Recorder(args=args, **parts(**model))
    before = trainables(trainer.model)
    trainer.train()
    after = trainables(trainer.model)
    sharded = any(hasattr(p, "full_tensor") for p in trainer.model.parameters())
    assert sharded == fsdp, "the case did not test what it says"
    log = [line for line in trainer.state.log_history if "siren/h_agg" in line]
    return trainer, {"before": before, "after": after, "seen": trainer.seen, "log": log}


# === the oracle ===


def oracle_entropy(z, top_p=0.8):
    """H' of one position, logits z [V]."""
    p = z.softmax(-1).sort(descending=True).values
    size = 0
    mass = 0.0
    while mass < top_p:
        mass += p[size].item()
        size += 1
    q = p[:size] / p[:size].sum()
    return -(q * q.log()).sum()


def oracle_responses(model, batches, temperature, quantile):
    """For every response: log-probabilities [t], H_i, peaks, tokens, advantage."""
    for batch in batches:
        for i, advantage in enumerate(batch["advantages"].tolist()):
            prompt, answer = (
                batch[f"{name}_ids"][i][batch[f"{name}_mask"][i].bool()]
                for name in ("prompt", "completion")
            )
            logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0]
            logits = logits[len(prompt) - 1 : -1] / temperature
            logp = logits.log_softmax(-1)[range(len(answer)), answer]
            h = torch.stack([oracle_entropy(z) for z in logits])
            values = h.detach().numpy()
            threshold = np.quantile(values, quantile)
            peak = np.flatnonzero((values >= threshold - 1e-12) & (values > 0))
            if quantile == 0:  # no mask
                peak = np.arange(len(values))
            h_i = h[peak].mean() if len(peak) else h.sum() * 0
            yield logp, h_i, len(peak), len(answer), advantage


def oracle_policy_loss(now, old):
    """Dr.GRPO: clipped ratios, a constant denominator."""
    loss = 0.0
    for (logp, *_, adv), old_logp in zip(now, old):
        ratio = (logp - old_logp).exp()
        loss -= torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).sum() / BUDGET / ROWS
    return loss


def oracle(
    runs, accumulation, *, steps=STEPS, lora=None, untied=False, temperature=1.0, **penalty
):
    """The run again, or its first steps: the weights after it and the values of each step."""
    measure = temperature, penalty.pop("peak_quantile", 0.8)
    options = {"regularizer": "anchor", "anchor": None, "siren_beta": BETA} | penalty
    regularizer, anchor, beta = options.values()
    model = base_model(untied)
    if lora:
        model = get_peft_model(model, lora)
        model.load_state_dict(runs[0]["before"], strict=False)
    model.double()
    weights = [p for p in model.parameters() if p.requires_grad]
    windows = [
        [batch for r in runs for batch in r["seen"][s * accumulation : (s + 1) * accumulation]]
        for s in range(STEPS)
    ]
    log = []
    old = []
    for step, window in enumerate(windows[:steps]):
        if step % 2 == 0:  # a new rollout
            with torch.no_grad():
                both = [
                    list(oracle_responses(model, windows[step + i], *measure))
                    for i in range(2)
                ]
            old = [[response[0] for response in half] for half in both]
            if anchor is None:
                anchor = float(torch.stack([r[1] for half in both for r in half]).mean())
        now = list(oracle_responses(model, window, *measure))
        policy = oracle_policy_loss(now, old[step % 2])
        h_agg = sum(response[1] for response in now) / len(now)
        penalty = {"anchor": (h_agg - anchor) ** 2, "bonus": -h_agg, "none": 0 * h_agg}
        penalty = beta * penalty[regularizer]
        gradients = torch.autograd.grad(policy + penalty, weights)
        with torch.no_grad():
            for p, g in zip(weights, gradients):
                p -= LR * g
        peaks = sum(response[2] for response in now) / sum(response[3] for response in now)
        values = {
            "h_agg": h_agg,
            "regularizer_loss": penalty,
            "anchor": anchor,
            "peak_fraction": peaks,
        }
        values = {f"siren/{name}": value for name, value in values.items()}
        values = {**values, "loss": policy + penalty}.items()
        log.append({name: float(torch.as_tensor(value).detach()) for name, value in values})
    return trainables(model), log


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def check_against_oracle(runs, case):
    names = ("lora", "untied", "temperature", "regularizer", "anchor", "siren_beta")
    names += ("peak_quantile",)
    known = {key: case[key] for key in names if key in case}
    accumulation = ROWS // case["micro"] // len(runs)
    weights, log = oracle(runs, accumulation, **known)
    for this in runs:
        assert len(this["log"]) == STEPS
        moved = largest_difference(this["after"], this["before"])
        assert moved > 1e-3, "a run that learns nothing proves nothing"
        tolerance = TOLERANCE[case.get("dtype", torch.float64)]
        assert largest_difference(this["after"], weights) < tolerance
    for expected, found in zip(log, runs[0]["log"], strict=True):  # the first process logs
        for name, value in expected.items():  # trl adds up its losses in float32
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    plain = oracle(runs, accumulation, steps=2, **known | {"siren_beta": 0.0})[1]
    gap = abs(plain[1]["siren/h_agg"] - log[1]["siren/h_agg"])
    assert gap > 1e-4, "the regulariser makes no difference here"


# === exactness ===


@pytest.mark.parametrize("name", [name for name in CASES if name not in TOGETHER])
def test_one_process_equals_plain_autograd(name, tmp_path):
    check_against_oracle([run(tmp_path, **F64 | CASES[name])[1]], CASES[name])


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The recordings of two processes started by torchrun, by case."""
    folder = tmp_path_factory.mktemp("together")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, __file__, str(folder), *TOGETHER]
    where = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    load = torch.load
    return {n: [load(folder / f"{n}-{rank}.pt") for rank in range(2)] for n in TOGETHER}


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_equal_plain_autograd(name, together):
    first, second = together[name]
    assert not torch.equal(
        first["seen"][0]["completion_ids"], second["seen"][0]["completion_ids"]
    )
    assert largest_difference(first["after"], second["after"]) == 0
    check_against_oracle([first, second], CASES[name])


def test_without_the_regulariser_it_is_trl(tmp_path):
    """Same samples, same weights, same values of all of TRL's own metrics."""
    ours, mine = run(tmp_path, 4, regularizer="none")
    theirs = GRPOTrainer(args=config(tmp_path, 4), **parts())
    theirs.train()
    assert largest_difference(mine["after"], trainables(theirs.model)) < 1e-6
    logs = zip(ours.state.log_history, theirs.state.log_history, strict=True)
    for here, there in logs:
        names = {
            name for name in there if not name.endswith(("time", "runtime", "per_second"))
        }
        new = {
            f"siren/{name}"
            for name in ("h_agg", "anchor", "regularizer_loss", "peak_fraction")
        }
        assert set(here) - set(there) == (new if "siren/h_agg" in here else set())
        for name in names:
            assert here[name] == pytest.approx(there[name], abs=1e-5), name


def test_evaluation_has_no_regulariser(tmp_path):
    still = {"max_steps": 1, "learning_rate": 0.0, "anchor": 0.7, "siren_beta": 1e6}
    trainer = Recorder(args=config(tmp_path, 16, **still), **parts())
    trainer.train()
    assert trainer.state.log_history[0]["siren/regularizer_loss"] > 1e3
    trainer.args.per_device_eval_batch_size = 16
    values = trainer.evaluate(parts()["train_dataset"].select(range(4)))
    assert abs(values["eval_loss"]) < 1 and not trainer._metrics["train"]


def test_autocast_rounds_no_entropy(tmp_path):
    """Under bf16 autocast the head must stay in float32: only hidden states are rounded."""
    trainer, recorded = run(tmp_path, 16, bf16=True, max_steps=2)
    model = ToyWorld().build_model()
    sums = []
    for batch in recorded["seen"][:1]:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(ids, attention_mask=seen, position_ids=positions)
        logits = hidden.last_hidden_state.double() @ model.lm_head.weight.double().T
        width = batch["completion_ids"].shape[1]
        for z, mask in zip(logits[:, -width - 1 : -1], batch["completion_mask"].bool()):
            h = torch.stack([oracle_entropy(row) for row in z[mask]])
            sums.append(h[h >= h.quantile(0.8) - 1e-9].mean().item())
    assert recorded["log"][0]["siren/h_agg"] == pytest.approx(np.mean(sums), abs=1e-5)
    assert trainer._h.dtype == torch.float32


def test_what_a_tool_wrote_is_no_choice(tmp_path):
    trainer = SirenGRPOTrainer(args=config(tmp_path, 16), **parts())
    trainer._h = torch.tensor([[1.0, 9.0, 2.0, 3.0]])
    batch = {"completion_mask": torch.tensor([[1, 1, 1, 0]])}
    batch["tool_mask"] = torch.tensor([[1, 0, 1, 1]])
    _, peak, mask = trainer._peaks(batch)
    assert peak.tolist() == [[False, False, True, False]]
    assert mask.tolist() == [[True, False, True, False]]


# === checkpoints ===


def test_resume_restores_the_anchor(tmp_path):
    """A resumed run ends with the weights and the anchor of an uninterrupted one."""
    save = {"save_strategy": "steps", "save_steps": 2}
    whole, recorded = run(tmp_path, 4, **save)
    checkpoint = tmp_path / "checkpoint-2"
    state = json.loads((checkpoint / "siren_state.json").read_text())
    assert state["anchor"] == whole.anchor == recorded["log"][0]["siren/anchor"]
    again = Recorder(args=config(tmp_path, 4, **save), **parts())
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.anchor == whole.anchor
    assert largest_difference(trainables(again.model), recorded["after"]) < 1e-6
    lines = [line for line in again.state.log_history if "siren/h_agg" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len({line["siren/anchor"] for line in lines}) == 1


def test_resume_needs_the_same_measure(tmp_path):
    run(tmp_path, 16, save_strategy="steps", save_steps=2, max_steps=2)
    other = Recorder(args=config(tmp_path, 16, siren_top_p=0.5), **parts())
    with pytest.raises(ValueError, match=r"--siren_top_p 0.5: .*0.8"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for option, message in (
        ("temperature", r"--temperature 2.0: .*1.0"),
        ("anchor", "leave it"),
    ):
        other = Recorder(args=config(tmp_path, 16, **{option: 2.0}), **parts())
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "siren_state.json").unlink()
    same = Recorder(args=config(tmp_path, 16), **parts())
    with pytest.raises(ValueError, match=r"siren_state\.json: does not exist"):
        same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_doctests():
    for module in (trl_siren, trl_data):
        result = doctest.testmod(module)
        assert result.attempted >= 1
        assert result.failed == 0


# === what it refuses ===


def test_version_guard(monkeypatch):
    trl_siren.check_version("1.16.3")
    with pytest.raises(ValueError, match=r"trl 1\.17\.0: tested with trl 1\.16\.\*"):
        trl_siren.check_version("1.17.0")
    monkeypatch.setattr(trl_siren, "version", lambda name: {"trl": "1.9.0"}[name])
    with pytest.raises(ValueError, match=r"trl 1\.9\.0"):
        SirenGRPOTrainer()
    pinned = (ROOT / "requirements-examples.txt").read_text()
    assert f"trl=={trl_siren.TESTED_WITH}" in pinned


@pytest.mark.parametrize(
    "options",
    [
        {"siren_beta": -1.0},
        {"siren_top_p": 0.0},
        {"peak_quantile": 1.5},
        {"entropy_chunk": -1},
        {"regularizer": "entropy"},
        {"beta": 0.04},
        {"top_p": 0.8},
        {"top_k": 2},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"anchor": float("nan")},
        {"anchor": -1.0},
        {"siren_beta": float("inf")},
        {"use_liger_kernel": True},
        {"entropy_coef": 0.01},
        {"use_adaptive_entropy": True},
        {"entropy_target": 0.5},
        {"top_entropy_quantile": 0.2},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
    ],
)
def test_refused_options(options, tmp_path):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^--{name} {value}: ") as error:
        config(tmp_path, 16, **options)
    assert "\n" not in str(error.value)


class TextProcessor(ProcessorMixin):
    """The least that TRL takes for a vision-language model's."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)


SMALL = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SMALL |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def refused(tmp_path, change, **options):
    """The one-line error of a trainer whose model or tokenizer was changed."""
    given = parts()
    given |= change(given)
    with pytest.raises(ValueError) as error:
        SirenGRPOTrainer(args=config(tmp_path, 16, **options), **given)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refused_models(tmp_path):
    moe = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2))
    assert "router_aux_loss_coef 0.001" in refused(tmp_path, lambda _: {"model": moe})
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8))
    assert "final_logit_softcapping 30" in refused(tmp_path, lambda _: {"model": gemma})

    def scaled(given):
        given["model"].config.logits_scaling = 8.0
        return {}

    assert "logits_scaling 8.0" in refused(tmp_path, scaled)

    def with_processor(given):
        given["model"].config.image_token_id = 3
        return {"processing_class": TextProcessor(given["processing_class"])}

    assert "vision inputs" in refused(tmp_path, with_processor)

    def attention_dropout(given):
        given["model"].model.layers[0].self_attn.attention_dropout = 0.1
        return {}

    assert "Qwen2Attention.attention_dropout 0.1" in refused(tmp_path, attention_dropout)
    lora = LoraConfig(r=2, lora_dropout=0.05)
    assert "Dropout.p 0.05" in refused(tmp_path, lambda _: {"peft_config": lora})
    plain = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="args GRPOConfig: must be a SirenGRPOConfig"):
        SirenGRPOTrainer(args=plain, **parts())


def test_sharded_heads_of_deepspeed_are_refused(tmp_path):
    """Checked on a stand-in, as deepspeed needs GPUs."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    fields = {"args": config(tmp_path, 16), "_is_vlm": False, "aux_loss_enabled": False}
    fields |= {"model": base_model(), "accelerator": SimpleNamespace(state=state)}
    with pytest.raises(ValueError, match="ZeRO stage 3: not supported"):
        trl_siren.check_supported(SimpleNamespace(**fields))
    state.deepspeed_plugin.zero_stage = 2
    trl_siren.check_supported(SimpleNamespace(**fields))


def test_experts_without_auxiliary_loss_are_fine(tmp_path):
    moe = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=2))
    args = config(tmp_path, 16, router_aux_loss_coef=0.0, max_steps=2)
    trainer = Recorder(args=args, **parts() | {"model": moe})
    trainer.train()
    assert trainer.state.log_history[0]["siren/h_agg"] > 0


def test_vision_inputs_are_refused(tmp_path):
    trainer = SirenGRPOTrainer(args=config(tmp_path, 16), **parts())
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"vision inputs \(pixel_values\)"):
        trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, ids, 2, pixel_values=ids
        )


# === the scripts ===


def test_script_on_the_toy(tmp_path, capsys):
    few = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
    assert trl_siren.main([*few, "--output_dir", str(tmp_path), "--lora_rank", "2"]) == 0
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert "siren/h_agg" in capsys.readouterr().out


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }} ="])
def test_script_on_a_model_and_a_file(template, tmp_path):
    toy = parts()
    toy["processing_class"].chat_template = template
    for part in ("model", "processing_class"):
        toy[part].save_pretrained(tmp_path / "model")
    rows = [{"question": "3 4 5 =", "answer": 12}, {"question": "1 2 =", "answer": 3}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    built = trl_data.text_parts(
        str(tmp_path / "model"), str(tmp_path / "data.jsonl"), "{question}"
    )
    prompt = built["train_dataset"][0]["prompt"]
    assert prompt == ([{"role": "user", "content": "3 4 5 ="}] if template else "3 4 5 =")
    assert built["train_dataset"]["answer"][:] == ["12", "3"]  # text, as the verifier wants it
    flags = {"model": tmp_path / "model", "data": tmp_path / "data.jsonl", "use_cpu": "true"}
    flags |= {
        "prompt": "{question}",
        "max_completion_length": 4,
        "report_to": "none",
        "bf16": "no",
    }
    flags |= {"max_steps": 1, "per_device_train_batch_size": 8, "output_dir": tmp_path / "out"}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert trl_siren.main(argv) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_answers_that_can_not_be_matched_are_refused(tmp_path, capsys):
    """A boxed answer is unboxed; more than one bad answer in a hundred is an error."""
    toy, file = parts(), tmp_path / "data.jsonl"
    for part in ("model", "processing_class"):
        toy[part].save_pretrained(tmp_path / "model")
    rows = [{"question": f"{n} =", "answer": f"\\boxed{{{n}}}"} for n in range(200)]
    rows[7]["answer"] = "}{"
    file.write_text("\n".join(map(json.dumps, rows)))
    built = trl_data.text_parts(str(tmp_path / "model"), str(file), "{question}")
    assert built["train_dataset"]["answer"][:9] == [*map(str, range(7)), "8", "9"]
    assert "left out: 1 of 200" in capsys.readouterr().err
    file.write_text("\n".join(map(json.dumps, rows[:50])))
    with pytest.raises(ValueError, match=r"1 of 50 answers of .* can't be matched"):
        trl_data.text_parts(str(tmp_path / "model"), str(file), "{question}")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--siren_top_p", "2"], "--siren_top_p 2.0: must be in (0, 1]"),
        (["--siren_beta", "x"], "invalid float value: 'x'"),
        (["--nonsense", "1"], "--nonsense"),
        (["--task", "toy_env:slip=2"], "from 0 to 1"),
        (
            ["--resume_from_checkpoint", "gone"],
            "--resume_from_checkpoint gone: no such folder",
        ),
        (
            ["--model", "m", "--data", "none.jsonl", "--use_cpu", "1", "--bf16", "0"],
            "none.jsonl",
        ),
    ],
)
def test_script_errors(argv, expected, capsys):
    assert trl_siren.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("trl_siren.py: error: ") and expected in line


@pytest.mark.parametrize(("name", "processes"), [("8gpu", 8), ("2nodes", 16)])
def test_launch_files(name, processes):
    path = EXAMPLES / f"accelerate_{name}.yaml"
    found = load_config_from_file(str(path))  # raises at a key that accelerate does not know
    assert (found.num_processes, found.fsdp_config["fsdp_version"]) == (processes, 2)
    lines = [
        line.strip("# \\") for line in path.read_text().splitlines() if line.startswith("#  ")
    ]
    words = " ".join(lines).split()
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    argv = words[words.index("examples/trl_siren.py") + 1 :]
    argv = [*argv, "--use_cpu", "true"]  # no GPU is needed to read the options
    _, args = trl_siren.Parser(
        (trl_siren.Script, SirenGRPOConfig)
    ).parse_args_into_dataclasses(argv)
    rollout = args.per_device_train_batch_size * args.steps_per_generation * processes
    mini_batch = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    )
    assert (rollout, mini_batch) == (128 * 8, 8 * 8)  # the paper's recipe


# === the comparison with siren.py ===


def test_the_page_shows_what_the_comparison_found():
    text = (ROOT / "docs" / "trl.md").read_text()
    for block in text.split("```python\n")[1:]:
        compile(block.split("```")[0], "trl.md", "exec")
    summary = json.loads(RESULT.read_text())["summary"]
    assert set(summary) == {"reward", "H_agg"} and all(s["within"] for s in summary.values())
    for name, found in summary.items():
        means = [np.mean(found[f"{engine}_last10"]) for engine in ("siren", "trl")]
        numbers = [f"{value:.3f}" for value in (*means, found["gap"], found["spread"])]
        assert f"| {name} | {' | '.join(numbers)} | {found['wider_splits']} |" in text


def test_comparison_knows_two_engines_from_one():
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(6, 30))
    assert compare(runs[:3], runs[3:])["within"]
    apart = compare(runs[:3], runs[3:] + 5)
    assert not apart["within"] and apart["wider_splits"] == "0 of 9"


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    for name in names:
        _, recorded = run(Path(out) / name, processes=2, **F64 | CASES[name])
        torch.save(recorded, Path(out) / f"{name}-{os.environ['RANK']}.pt")
