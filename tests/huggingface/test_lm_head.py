"""What `lm_head_of` checks when, what it leaves untouched, and what it refuses."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from fused_distill.huggingface.forward import states_at_head
from fused_distill.huggingface.lm_head import last_hidden_states, lm_head_of
from tiny_families import tiny_model, transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs no kernel"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TOKENS = torch.randint(3, 37, (2, 7))


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


def count_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that gets an entry with each forward of the model."""
    runs, forward = [], model.forward

    def counting(input_ids: Tensor, **options: Any) -> Any:
        runs.append(None)
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", counting)
    return runs


def changes_logits(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Let the model change its logits, as a model with code of its own does."""
    forward = model.forward

    def changing(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = changing
    return model


def adapted(model: Any, **options: Any) -> Any:
    """Return the model with LoRA on its LM head."""
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["lm_head", "q_proj"], "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()


def test_model_without_a_head_is_refused() -> None:
    model = transformers.AutoModel.from_config(tiny_model("llama").config)
    with pytest.raises(
        ValueError, match=r"model must have output embeddings, got LlamaModel: load it with Auto"
    ):
        lm_head_of(model)


def test_what_is_no_causal_language_model_is_refused(llama: Any) -> None:
    for wrong in ("llama", llama.lm_head):
        with pytest.raises(
            ValueError, match=f"must be a transformers causal language model, got {type(wrong).__name__}"
        ):
            lm_head_of(wrong)


def test_a_model_in_data_parallel_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"must not be in nn\.DataParallel, .* use DistributedDataParallel"):
        last_hidden_states(torch.nn.DataParallel(llama), input_ids=TOKENS)


def test_hidden_states_are_on_the_device_of_the_head() -> None:
    with FakeTensorMode(), torch.no_grad():
        head = torch.nn.Module()
        head.weight = torch.nn.Parameter(torch.empty(3, 4, device="cuda"))
        states = states_at_head(lambda: (head(torch.ones(1, 2, 4)),), head)
    assert states.device.type == "cuda"


def test_hidden_states_of_a_model_with_an_offloaded_head_stay_where_they_are() -> None:
    head, inputs = torch.nn.Linear(4, 3, device="meta"), torch.ones(1, 2, 4)
    assert torch.equal(states_at_head(lambda: (head(inputs),), head), inputs)


def test_random_numbers_of_gpus_that_the_model_does_not_use_are_left_alone(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(42)
    del seeds[:]
    expected = torch.rand(3)
    torch.manual_seed(42)
    del seeds[:]
    lm_head_of(llama)
    assert torch.equal(torch.rand(3), expected)
    assert seeds == []


def test_hidden_states_do_not_depend_on_labels(llama: Any) -> None:
    expected = last_hidden_states(llama, input_ids=TOKENS)
    assert torch.equal(last_hidden_states(llama, input_ids=TOKENS, labels=TOKENS), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda z: z.log_softmax(-1), "more than to scale and cap"),
        (
            lambda z: z + 1,
            "more than to scale and cap, e.g. token 1 gets the logit -0.5 where the layer gave -1.5",
        ),
        (lambda z: z.index_fill(-1, torch.tensor([5]), -1e9), "e.g. token 5 gets the logit -1e"),
        (lambda z: z.clamp(-30, 30), "more than to scale and cap"),
        (lambda z: z * (1 + z.relu()), "more than to scale and cap"),
        (lambda z: z * 0, "more than to scale and cap"),
        (lambda z: torch.cat([z, z], -1), r"logits of shape \(1, 6, 256\)"),
        (lambda z: z[:, -1:], r"logits of shape \(1, 1, 128\)"),
    ],
)
def test_model_that_changes_its_logits_otherwise_is_refused(
    llama: Any, change: Callable[[Tensor], Tensor], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"logits of LlamaForCausalLM cannot be computed .*{reason}"):
        lm_head_of(changes_logits(llama, change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scale_and_softcap_without_a_config_field_are_found(llama: Any, dtype: torch.dtype) -> None:
    model = changes_logits(llama.to(dtype), lambda z: 7.3 * torch.tanh(z * 0.37 / 7.3))
    head = lm_head_of(model)
    assert head.logit_scale == pytest.approx(0.37, rel=1e-6)
    assert head.softcap == pytest.approx(7.3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_the_config_are_exact_where_logits_are_rounded(dtype: torch.dtype) -> None:
    model = tiny_model("granite")
    model.config.logits_scaling = model.logits_scaling = 3.0
    head = lm_head_of(changes_logits(model.to(dtype), lambda z: z.to(dtype)))
    assert head.logit_scale == 1 / 3


def test_layer_that_does_more_than_a_product_is_refused(llama: Any) -> None:
    llama.lm_head.register_forward_hook(lambda _module, _inputs, output: output)  # a hook may be there
    lm_head_of(llama)
    own = llama.lm_head.forward
    other = copy.deepcopy(llama)
    other.lm_head.forward = lambda states: own(states.relu())
    with pytest.raises(ValueError, match="output layer, a Linear, is no product with its weight"):
        lm_head_of(other)


def test_layer_without_a_floating_point_weight_is_refused(llama: Any) -> None:
    llama.lm_head.weight = torch.nn.Parameter(torch.ones(128, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="one linear layer with a floating-point weight, got Linear with"):
        lm_head_of(llama)


def test_model_that_needs_other_inputs_is_refused(llama: Any) -> None:
    def forward(input_ids: Tensor, images: Tensor) -> None:
        raise AssertionError

    llama.forward = forward
    with pytest.raises(ValueError, match=r"cannot be run on token ids alone \(TypeError: .*images"):
        lm_head_of(llama)


def test_each_model_is_run_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(llama, monkeypatch)
    lm_head_of(llama)
    lm_head_of(llama)
    assert len(runs) == 1


def test_a_changed_config_or_layer_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2")
    runs = count_runs(model, monkeypatch)
    assert lm_head_of(model).softcap == 5
    model.config.final_logit_softcapping = 7.0
    assert lm_head_of(model).softcap == 7
    model.resize_token_embeddings(50)
    assert len(lm_head_of(model).weight) == 50
    assert len(runs) == 3


def test_modes_and_random_numbers_stay_as_they_are() -> None:
    model = tiny_model("mixtral").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    lm_head_of(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.lm_head)
    assert all(p.grad is None for p in model.parameters())


def test_dropout_does_not_disturb_the_check() -> None:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, resid_pdrop=0.9)
    ).train()
    assert lm_head_of(model).logit_scale == 1


def test_states_that_the_decoder_does_not_give_are_announced() -> None:
    with pytest.warns(UserWarning, match=r"RobertaForCausalLM transforms .*\.last_hidden_states\(model"):
        lm_head_of(tiny_model("roberta"))


def test_compiled_model_has_the_same_head_and_states(llama: Any) -> None:
    compiled = torch.compile(llama, backend="eager")
    head = lm_head_of(compiled)
    assert head.weight is llama.lm_head.weight
    with torch.no_grad():
        states = last_hidden_states(compiled, input_ids=TOKENS)
        torch.testing.assert_close(head.logits(states), compiled(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [("granite", 0.25, None), ("hyperclovax", 4.0, None), ("recurrent_gemma", 1.0, 5.0), ("xlstm", 1.0, 5.0)],
)
def test_sharded_model_is_not_run_and_its_config_is_read(
    caplog: pytest.LogCaptureFixture, family: str, scale: float, softcap: float | None
) -> None:
    model = tiny_model(family)
    model.lm_head.weight.ds_id = 0  # of DeepSpeed ZeRO-3
    model.forward = None  # a run would wait for other processes
    with caplog.at_level(logging.WARNING):
        head = lm_head_of(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    assert f"weights of {type(model).__name__} are sharded" in caplog.text


def test_model_that_was_checked_before_it_was_sharded_stays_checked(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("mpt")
    lm_head_of(model)
    model.lm_head.weight.ds_id = 0
    with caplog.at_level(logging.WARNING):
        assert lm_head_of(model).logit_scale == 1
    assert not caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_head_counts_and_gets_its_gradient(llama: Any, dtype: torch.dtype) -> None:
    lm_head_of(llama)  # before the adapters: not what is used below
    model = adapted(llama.to(dtype))
    logits = model(input_ids=TOKENS).logits
    ours = lm_head_of(model).logits(last_hidden_states(model, input_ids=TOKENS))
    tolerance = 4 * torch.finfo(dtype).eps * float(logits.abs().max())
    torch.testing.assert_close(ours, logits, rtol=0, atol=tolerance)
    adapters = {name: p for name, p in model.named_parameters() if "lm_head.lora" in name}
    gradients = [torch.autograd.grad(z.square().sum(), [*adapters.values()]) for z in (ours, logits)]
    assert len(adapters) == 2
    for mine, peer in zip(*gradients, strict=True):
        assert (mine - peer).norm() <= 20 * torch.finfo(dtype).eps * peer.norm()


def test_disabled_and_merged_lora_are_followed(llama: Any) -> None:
    model = adapted(llama)
    weight, base = lm_head_of(model).weight, llama.lm_head.base_layer.weight
    with model.disable_adapter():
        assert lm_head_of(model).weight is base
    model.merge_adapter()
    torch.testing.assert_close(lm_head_of(model).weight, weight)


def test_lora_with_dropout_on_the_head_is_refused_in_training(llama: Any) -> None:
    model = adapted(llama, lora_dropout=0.1)
    lm_head_of(model)
    with pytest.raises(ValueError, match=r"on the output layer of LlamaForCausalLM has dropout 0\.1"):
        lm_head_of(model.train())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_are_no_sum_of_weights_are_refused(llama: Any, options: dict[str, bool]) -> None:
    # They may start out equal to a weight, so that no comparison of logits tells them apart.
    model = adapted(llama, init_lora_weights=True, **options)
    with pytest.raises(ValueError, match=r"of LlamaForCausalLM trains lora_.*, which is neither its weight"):
        lm_head_of(model)
