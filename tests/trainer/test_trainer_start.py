"""Tests of the start of a run: what is loaded, how often, and what is printed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import pytest
from fused_distill.huggingface.loading import read_tokenizer, tokenizer_digest
from fused_distill.trainer.data import load_data
from fused_distill.trainer.loop import Trainer, train
from limits import seconds
from trainer_cases import NOT_INTERPRETED, Lab, transformers
from trainer_cases import lab as lab

pytestmark = NOT_INTERPRETED


def test_each_thing_is_loaded_once(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Folders of their own, as tokenizers stay in memory with the runs that use them.
    student, teacher = (shutil.copytree(p, tmp_path / p.name) for p in (lab.student, lab.teacher))
    for path in (student, teacher):
        (path / "token_of_this_test.txt").write_text(str(tmp_path))
    loads = Counter[str]()

    def counted(kind: str, cls: Any, method: str) -> None:
        original = getattr(cls, method)

        def count(*arguments: Any, **options: Any) -> Any:
            loads[kind] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(cls, method, count)

    counted("tokenizers", transformers.AutoTokenizer, "from_pretrained")
    counted("models", transformers.AutoModelForCausalLM, "from_pretrained")
    counted("vocabularies", transformers.PreTrainedTokenizerFast, "get_vocab")
    Trainer(lab.config(tmp_path / "run", f"student={student}", f"teacher.model={teacher}"))
    assert loads["tokenizers"] == 1  # for both models
    assert loads["models"] == 2
    assert loads["vocabularies"] <= 2  # one for the fingerprint, one when it was loaded


def test_tokenizers_of_other_content_are_not_shared(lab: Lab, tmp_path: Path) -> None:
    other = shutil.copytree(lab.student, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    first, same, changed = (read_tokenizer(str(path)) for path in (lab.student, lab.teacher, other))
    assert first is same
    assert changed is not first
    assert changed.chat_template != first.chat_template
    assert tokenizer_digest(changed) != tokenizer_digest(first)


@pytest.mark.parametrize(
    ("change", "again"), [("nothing", False), ("template", True), ("setting", True), ("data", True)]
)
def test_tokenized_samples_are_read_from_the_cache_until_something_changes(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, again: bool
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": tmp_path.name}]}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.student)
    tokenizer.chat_template = "{{ messages[0].content }}"
    config = lab.config(tmp_path, f"data.path={data}")
    load_data(config, tokenizer, completions=False)
    if change == "template":
        tokenizer.chat_template += "!"
    elif change == "setting":
        config = lab.config(tmp_path, f"data.path={data}", "data.max_prompt_length=5")
    elif change == "data":
        data.write_text(json.dumps({"prompt": f"other than {tmp_path.name}"}))
    calls: list[Any] = []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **o: (calls.append(a), encode(*a, **o))[1])
    load_data(config, tokenizer, completions=False)
    assert bool(calls) == again


def test_a_run_says_what_it_loads_and_with_what_it_trains(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("lora.r=2", "data.evaluation_prompts=4", "save_every=1")
    train(lab.config(tmp_path, "steps=1", *overrides))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"loading the tokenizer of {lab.student}",
        f"{lab.data}: 40 rows, 40 samples used",
        "loading the teacher",
        f"loading the student {lab.student}",
    ]
    header = {line.split()[0]: line for line in lines[4:9]}
    assert header["student"].endswith(f"{lab.student}: 7,376 parameters, 1,024 trained by LoRA of rank 2")
    assert header["teacher"].endswith(f"{lab.teacher}: 9,656 parameters in float32, targets full")
    assert header["device"].endswith("cpu, 1 process, precision fp32")
    assert header["data"].endswith("36 samples for training, 4 held out")
    assert header["steps"].endswith("0 of 1 done, 8 prompts each")
    train(lab.config(tmp_path, "steps=2", *overrides), resume=True)
    resumed = "resumed from the checkpoint of step 1, 1 of 2 done, 8 prompts each"
    assert any(line.endswith(resumed) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("command", "number", "status", "cause"),
    [
        ("train", SIGINT, 130, "Ctrl-C"),
        ("check", SIGTERM, 143, "SIGTERM"),
        ("cache-teacher", SIGINT, 130, "Ctrl-C"),
    ],
)
def test_a_signal_while_models_load_ends_a_command_with_one_line(
    lab: Lab, tmp_path: Path, command: str, number: int, status: int, cause: str
) -> None:
    lab.config(tmp_path)
    paths = [f"student={lab.student}", f"output={tmp_path}", f"data.path={lab.data}"]
    arguments = [command, str(tmp_path / "settings.yaml"), *paths, f"teacher.model={lab.teacher}"]
    arguments += ["teacher.targets=topk"]
    if command == "cache-teacher":
        arguments += ["--output", str(tmp_path / "store")]
    # The exception that Ctrl-C raises by default is swallowed here, as a library may do.
    script = f"""
import time
from transformers import AutoModelForCausalLM
def load(*_, **__):
    print("LOADING", flush=True)
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass
AutoModelForCausalLM.from_pretrained = load
from fused_distill.cli import main
main({arguments!r})
"""
    command_line = [sys.executable, "-c", script]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line == "LOADING\n" for line in process.stdout)
        process.send_signal(number)
        assert process.wait(seconds(60)) == status
        error = process.stderr.read()
    assert error.splitlines()[-1] == f"fused-distill {command}: stopped by {cause}"
    assert "Traceback" not in error
