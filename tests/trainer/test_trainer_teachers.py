"""One loss, wherever the teacher's distribution comes from: a model here, a server, a store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_distill.cli import main
from fused_distill.serving.protocol import logprobs as wire
from fused_distill.serving.server.transformers_engine import TransformersEngine
from fused_distill.trainer import stored, teachers
from fused_distill.trainer.config import ConfigError
from fused_distill.trainer.data import Batch
from fused_distill.trainer.loop import Trainer, train
from fused_distill.trainer.stored import store_teacher
from fused_distill.trainer.student import pretrained
from fused_distill.trainer.targets import TopKTargets
from fused_distill.trainer.teachers import ServedTeacher
from pyarrow import parquet
from serving_cases import serving, serving_app
from trainer_cases import ABOUT_THE_TRAINER, Lab, losses, save_model, transformers
from trainer_cases import lab as lab

pytestmark = ABOUT_THE_TRAINER


@pytest.fixture(scope="module")
def url(lab: Lab) -> Iterator[str]:
    with serving(TransformersEngine.load(str(lab.teacher), "cpu", "float32")) as served:
        yield served.url


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_served_teacher_gives_the_local_ones_exact_loss(lab: Lab, url: str, tmp_path: Path) -> None:
    train(lab.config(tmp_path / "local"))
    train(lab.config(tmp_path / "served", f"teacher.url={url}"))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "local"), rel=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_a_served_teacher_gives_the_local_one_at_the_students_tokens(
    lab: Lab, url: str, tmp_path: Path, tail: str
) -> None:
    how = ["teacher.targets=student_topk", "teacher.k=5", f"teacher.tail={tail}", "temperature=1.5"]
    train(lab.config(tmp_path / "local", *how))
    train(lab.config(tmp_path / "served", f"teacher.url={url}", *how))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


TOPK = ("teacher.targets=topk", "teacher.k=5", "lmbda=0", "temperature=1.5", "data.evaluation_prompts=8")


def test_local_served_and_stored_top_k_give_the_same_losses(lab: Lab, url: str, tmp_path: Path) -> None:
    local, served = f"teacher.model={lab.teacher}", f"teacher.url={url}"
    for source, name in ((local, "by_model"), (served, "by_server")):
        store_teacher(lab.config(tmp_path / name, *TOPK, source), tmp_path / name / "store", "float32")
    train(lab.config(tmp_path / "local", *TOPK, local))
    train(lab.config(tmp_path / "served", *TOPK, served))
    for name in ("by_model", "by_server"):
        source = f"teacher={{stored: {tmp_path}/{name}/store, targets: topk, k: 5}}"
        train(lab.config(tmp_path / name, *TOPK, source))
    want = losses(tmp_path / "local")
    for name in ("served", "by_model", "by_server"):
        assert losses(tmp_path / name) == pytest.approx(want, rel=1e-4), name


def test_ids_beyond_the_students_head_count_as_the_rest(lab: Lab, url: str, tmp_path: Path) -> None:
    """Of a stock vLLM server, which gives all of its 104: 6 have no row in the student's head."""
    how = [f"teacher.url={url}", "teacher.targets=topk", "teacher.k=98", "lmbda=0"]
    trainer = Trainer(lab.config(tmp_path, *how))
    assert isinstance(trainer.teacher, ServedTeacher)
    trainer.teacher.normalises = False
    batch = Batch.of(trainer.fill_buffer()[0], torch.device("cpu"))
    targets = trainer.teacher.targets(batch, None)
    assert isinstance(targets, TopKTargets)
    beyond = (targets.ids >= 98) & batch.mask.unsqueeze(-1)
    assert beyond.any()
    assert (targets.logprobs[beyond] == -torch.inf).all()
    assert trainer.loss(batch, 1.0)[0] > 0


@pytest.mark.parametrize("rows", [98, 104])
def test_heads_of_different_rows_compare_what_they_share(
    lab: Lab, tiny_model: Path, tmp_path: Path, rows: int
) -> None:
    student = save_model(tmp_path / "student", tiny_model, vocab_size=202 - rows)
    teacher = save_model(tmp_path / "teacher", tiny_model, vocab_size=rows, hidden_size=24)
    for targets in ("full", "topk", "student_topk"):
        source = f"teacher={{model: {teacher}, targets: {targets}, k: 98, tail: renormalize}}"
        train(lab.config(tmp_path / targets, f"student={student}", source, "lmbda=0"))
    # The whole vocabulary by another way; the student's rows beyond it are no outcomes.
    assert losses(tmp_path / "topk") == pytest.approx(losses(tmp_path / "full"), rel=1e-4)
    assert losses(tmp_path / "student_topk") == pytest.approx(losses(tmp_path / "full"), rel=1e-4)


def test_a_teacher_is_loaded_whole_in_every_process_of_fsdp(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    seen: dict[str, str] = {}

    def watched(kind: Any, key: str, name: str, **options: Any) -> Any:
        seen[key] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
        return pretrained(kind, key, name, **options)

    monkeypatch.setattr(teachers, "pretrained", watched)
    Trainer(lab.config(tmp_path))
    assert seen["teacher.model"] == "false"
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


@pytest.fixture(scope="module")
def stranger(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with two characters' ids exchanged."""
    path = tmp_path_factory.mktemp("stranger") / "teacher"
    shutil.copytree(lab.teacher, path)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    return path


def test_another_tokenizer_is_refused(lab: Lab, stranger: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model: the teacher's tokenizer gives tokens other ids"):
        Trainer(lab.config(tmp_path, f"teacher.model={stranger}"))
    with (
        serving(TransformersEngine.load(str(stranger), "cpu", "float32")) as served,
        pytest.raises(ConfigError, match=r"teacher\.url: the teacher's tokenizer gives tokens other ids"),
    ):
        Trainer(lab.config(tmp_path, f"teacher.url={served.url}"))


# A stock vLLM server.


class StockVllm:
    """What is used of vLLM's OpenAI server, around a model of transformers."""

    def __init__(self, folder: Path):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        request = Request(scope, receive)
        answers = {"/v1/models": {"data": [{"id": "stock"}]}, "/v1/completions": None}
        status, answer = 200, answers.get(request.url.path, {"error": "Not Found"})
        if request.url.path == "/v1/completions":
            asked = await request.json()
            rows = [self.scored(tokens, asked["prompt_logprobs"]) for tokens in asked["prompt"]]
            answer = {"choices": [{"index": i, "prompt_logprobs": row} for i, row in enumerate(rows)]}
        elif request.url.path not in answers:
            status = 404
        await JSONResponse(answer, status)(scope, receive, send)

    @torch.no_grad()
    def scored(self, tokens: list[int], k: int) -> list[Any]:
        logprobs = self.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        positions: list[Any] = [None]
        for row, actual in zip(logprobs, tokens[1:], strict=False):
            ranked = row.argsort(descending=True).tolist()
            kept = {*ranked[:k], actual}
            positions.append({str(t): {"logprob": row[t].item(), "rank": ranked.index(t) + 1} for t in kept})
        return positions


@pytest.fixture(scope="module")
def unpadded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with as many rows as the student, as a stock vLLM server leaves out none."""
    return save_model(tmp_path_factory.mktemp("unpadded"), tiny_model, hidden_size=24)


@pytest.fixture(scope="module")
def stock(unpadded: Path) -> Iterator[str]:
    with serving_app(StockVllm(unpadded)) as served:
        yield served.url


def test_a_stock_vllm_server_gives_the_local_top_k(
    lab: Lab, unpadded: Path, stock: str, tmp_path: Path
) -> None:
    how = ["teacher.targets=topk", "teacher.k=5"]
    train(lab.config(tmp_path / "local", *how, f"teacher.model={unpadded}"))
    train(lab.config(tmp_path / "stock", *how, f"teacher.url={stock}"))
    assert losses(tmp_path / "stock") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "teacher.targets=full",
            "teacher.targets: must be topk with this server, which has no hidden_states",
        ),
        ("teacher.targets=student_topk", "teacher.targets: must be topk with this server, .* score_ids"),
        ("temperature=2", r"temperature: must be 1 with this server, got 2\.0"),
    ],
)
def test_what_a_stock_vllm_server_cannot_do_is_refused(
    lab: Lab, stock: str, tmp_path: Path, override: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Trainer(lab.config(tmp_path, f"teacher.url={stock}", "teacher.targets=topk", "teacher.k=5", override))


# Stores.


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_resumed_store_is_the_one_written_in_one_go(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "PART_ROWS", 16)
    config = lab.config(tmp_path, *TOPK)
    store_teacher(config, tmp_path / "whole", "float32")
    whole = bytes_of(tmp_path / "whole")
    assert sorted(whole) == [*(f"part-{i:06}.parquet" for i in range(3)), "teacher.json"]

    write_table = parquet.write_table

    def dies(table: Any, path: Path, **options: Any) -> None:
        write_table(table, path, **options)
        if path.name.startswith("part-000001"):
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(parquet, "write_table", dies)
    with pytest.raises(KeyboardInterrupt):
        store_teacher(config, tmp_path / "resumed", "float32")
    with pytest.raises(ConfigError, match=r"teacher\.stored: .* is not whole: run cache-teacher again"):
        Trainer(lab.config(tmp_path, *TOPK, f"teacher={{stored: {tmp_path}/resumed, targets: topk, k: 5}}"))
    monkeypatch.setattr(parquet, "write_table", write_table)
    store_teacher(config, tmp_path / "resumed", "float32")
    assert bytes_of(tmp_path / "resumed") == whole


def test_a_store_in_float16_is_half_the_numbers_and_near(lab: Lab, tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        config = lab.config(tmp_path / dtype, *TOPK)
        store_teacher(config, tmp_path / dtype / "store", dtype)
        source = f"teacher={{stored: {tmp_path}/{dtype}/store, targets: topk, k: 5}}"
        train(lab.config(tmp_path / dtype, *TOPK, source))
    small, large = (
        parquet.read_table(tmp_path / dtype / "store" / "part-000000.parquet")["answer"].to_pylist()
        for dtype in ("float16", "float32")
    )
    positions = sum(len(wire.decode_binary(answer).ids) for answer in large)
    assert sum(map(len, large)) - sum(map(len, small)) == positions * (5 + 1) * 2 > 0
    assert losses(tmp_path / "float16") == pytest.approx(losses(tmp_path / "float32"), rel=1e-2)
    assert losses(tmp_path / "float16") != losses(tmp_path / "float32")


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    store_teacher(lab.config(folder / "output", *TOPK), folder / "store", "float32")
    return folder / "store"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("teacher.k=6", r"it holds k 5 at temperature 1\.5, not k 6 at 1\.5"),
        ("temperature=1", r"it holds k 5 at temperature 1\.5, not k 5 at 1\.0"),
        ("teacher.stored=/nowhere", "/nowhere holds no teacher.json"),
    ],
)
def test_a_store_of_something_else_is_refused(
    lab: Lab, store: Path, tmp_path: Path, override: str, complaint: str
) -> None:
    source = f"teacher={{stored: {store}, targets: topk, k: 5}}"
    with pytest.raises(ConfigError, match=f"teacher.stored: {complaint}"):
        Trainer(lab.config(tmp_path, *TOPK, source, override))


def test_a_store_holds_every_smaller_k_too(lab: Lab, store: Path, tmp_path: Path) -> None:
    train(lab.config(tmp_path / "local", *TOPK, "teacher.k=3"))
    train(lab.config(tmp_path / "stored", *TOPK, f"teacher={{stored: {store}, targets: topk, k: 3}}"))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


def test_a_store_of_other_data_is_refused(lab: Lab, store: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(lab.data.read_text().replace("a", "b"))
    source = f"teacher={{stored: {store}, targets: topk, k: 5}}"
    with pytest.raises(ConfigError, match=r"teacher\.stored: it has no completion \["):
        train(lab.config(tmp_path, *TOPK, source, f"data.path={data}"))


def test_the_command_stores_and_does_not_mix_stores(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.config(tmp_path)
    command = ["cache-teacher", str(tmp_path / "settings.yaml"), *TOPK, f"output={tmp_path}"]
    command += [f"student={lab.student}", f"teacher.model={lab.teacher}", f"data.path={lab.data}"]
    command += ["--output", str(tmp_path / "store")]
    main(command)
    assert (tmp_path / "store" / "part-000000.parquet").exists()
    with pytest.raises(SystemExit) as end:
        main([*command, "--dtype", "float16"])
    assert end.value.code == 2
    assert "holds another store" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        main([*command, "teacher.targets=full"])
    assert "teacher.targets: must be topk for a store" in capsys.readouterr().err.splitlines()[-1]
