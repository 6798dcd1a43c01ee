"""Pairs of real models whose sizes the benchmarks use: hidden_size and vocab_size of their config.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    name: str
    hidden_size: int
    vocab_size: int  # rows of the LM head, which may be more than the tokenizer's


@dataclass(frozen=True)
class Pair:
    student: Model
    teacher: Model

    @property
    def vocab(self) -> int:
        """Return the rows that both LM heads have."""
        return min(self.student.vocab_size, self.teacher.vocab_size)

    @property
    def dims(self) -> tuple[int, int]:
        return self.student.hidden_size, self.teacher.hidden_size

    @property
    def name(self) -> str:
        return f"{self.student.name} from {self.teacher.name}"


QWEN25_05B = Model("Qwen2.5 0.5B", 896, 151936)
QWEN25_15B = Model("Qwen2.5 1.5B", 1536, 151936)
QWEN3_06B = Model("Qwen3 0.6B", 1024, 151936)
QWEN3_17B = Model("Qwen3 1.7B", 2048, 151936)
QWEN3_8B = Model("Qwen3 8B", 4096, 151936)
QWEN3_32B = Model("Qwen3 32B", 5120, 151936)
LLAMA32_1B = Model("Llama 3.2 1B", 2048, 128256)
LLAMA31_8B = Model("Llama 3.1 8B", 4096, 128256)
GEMMA3_270M = Model("Gemma 3 270M", 640, 262144)
GEMMA3_1B = Model("Gemma 3 1B", 1152, 262144)
GEMMA3_4B = Model("Gemma 3 4B", 2560, 262208)

QWEN25 = Pair(QWEN25_05B, QWEN25_15B)
QWEN3 = Pair(QWEN3_06B, QWEN3_8B)
QWEN3_MEDIUM = Pair(QWEN3_17B, QWEN3_8B)
QWEN3_LARGE = Pair(QWEN3_8B, QWEN3_32B)
LLAMA3 = Pair(LLAMA32_1B, LLAMA31_8B)
GEMMA3 = Pair(GEMMA3_270M, GEMMA3_4B)
GEMMA3_SMALL = Pair(GEMMA3_270M, GEMMA3_1B)
GEMMA3_DEMO = Pair(GEMMA3_270M, GEMMA3_270M)  # the pair of `make demo`: its student has fewer layers

PAIRS = (QWEN3, LLAMA3, GEMMA3)
ALL_PAIRS = (*PAIRS, QWEN25, QWEN3_MEDIUM, QWEN3_LARGE, GEMMA3_SMALL, GEMMA3_DEMO)


def names_of(vocab: int, student_dim: int, teacher_dim: int) -> str:
    """Return the models of a shape; for a top-k teacher (teacher_dim 0), the student. Empty if unknown."""
    for pair in ALL_PAIRS:
        if teacher_dim == 0 and student_dim == pair.student.hidden_size:
            name, whole = pair.student.name, vocab == pair.student.vocab_size
        elif pair.dims == (student_dim, teacher_dim):
            name, whole = pair.name, vocab == pair.vocab
        else:
            continue
        return name if whole else f"sizes of {name}, part of the vocabulary"
    return ""
