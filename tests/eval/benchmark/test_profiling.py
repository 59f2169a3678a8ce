"""Passes timed and profiled in the middle of an image: where they run, how often, and what each operator counts as."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.tiny import GPT, class_gpt
from tests.pipelines.test_masked import class_mar, small_vae
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.rng import Noise
from visar.errors import VisarError
from visar.eval.benchmark import profiling
from visar.eval.benchmark.profiling import (
    GEMM,
    HOST,
    MODEL,
    MODEL_RANGE,
    SAMPLING,
    TARGET_PROBS,
    TITLES,
    VERIFY,
    group_of_kernel,
    group_of_launch,
    group_of_operator,
    profile_model,
    profile_passes,
    ranges,
)
from visar.eval.benchmark.steady import steady
from visar.families.llamagen.session import LlamaGenSession
from visar.pipelines import ClassToImagePipeline, TextToImagePipeline
from visar.samplers import Autoregressive, SpeculativeJacobi, Target, get_sampler

LENGTH = GPT["grid"] ** 2


def session(window: int, batch: int = 2) -> LlamaGenSession:
    torch.manual_seed(0)
    return LlamaGenSession(class_gpt(), torch.arange(batch), length=LENGTH, window=window, guidance=Guidance(2.0))


class Watched(SpeculativeJacobi):
    """Remembers where each pass began."""

    def step(self, session: Any, state: Any) -> None:
        seen.append(session.lengths.tolist())
        super().step(session, state)


seen: list[list[int]] = []
NOISE = Noise(0, torch.arange(2))


@pytest.mark.parametrize(("every", "window"), [(1, 6), (3, 4)])
@pytest.mark.parametrize("graphed", [False, True])
def test_passes_stay_in_the_middle(every: int, window: int, graphed: bool) -> None:
    seen.clear()
    entered: list[int] = []

    class Trace(nullcontext):  # type: ignore[type-arg]
        def __enter__(self) -> None:
            entered.append(len(seen))

        def __exit__(self, *_: object) -> None:
            entered.append(len(seen))

    made = session(window)
    graph = Graph(lambda step: step) if graphed else None  # a capture that records nothing
    found = steady(
        made, Watched(window=window), Target(), NOISE, passes=30, warm=2, every=every, graph=graph, traced=Trace
    )
    assert (found.capture_seconds is not None) == graphed
    warm = 2 if every == 1 else 3
    assert found.passes == 30 and found.ms_per_pass > 0
    assert entered == [warm + 30, warm + 60]  # as many passes again are traced as were timed
    assert all(LENGTH // 2 <= n < LENGTH for lengths in seen[every : warm + 60] for n in lengths)
    assert len(seen) == warm + 60 and not bool((made.lengths == LENGTH).any())


def test_a_pass_takes_the_time_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read around the passes that are counted, and nothing else."""
    now = iter([10.0, 10.6])
    real = torch.inference_mode
    monkeypatch.setattr("visar.eval.benchmark.steady.time", SimpleNamespace(perf_counter=lambda: next(now)))
    with real():
        found = steady(session(1), Autoregressive(), Target(), NOISE, passes=6, warm=1)
    assert found.ms_per_pass == pytest.approx(100)


def test_the_host_waits_for_no_pass_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a GPU would run dry after every look."""
    waits: list[str] = []
    for module in ("engine.loop", "eval.benchmark.steady"):
        monkeypatch.setattr(f"visar.{module}.synchronize", lambda device, module=module: waits.append(module))
    steady(session(1), Autoregressive(), Target(), NOISE, passes=6, warm=1)
    assert waits == ["engine.loop", "eval.benchmark.steady", "eval.benchmark.steady"]


def test_a_decoding_that_ends_too_early() -> None:
    with pytest.raises(VisarError, match="ended before 50 passes"):
        steady(session(1), Autoregressive(), Target(), NOISE, passes=2, every=50)


def test_a_fixed_schedule_is_not_run_past(text_pipe: TextToImagePipeline) -> None:
    turns = len(text_pipe.image_model.fitted(get_sampler("zipar", ahead=2)).turns)
    assert profile_model(text_pipe, get_sampler("zipar", ahead=2), warm=1).passes == (turns - 1) // 2


@pytest.mark.parametrize("window", [1, 5])
def test_profile(window: int) -> None:
    sampler = Autoregressive() if window == 1 else SpeculativeJacobi(window=window)
    found = profile_passes(session(window), sampler, Target(top_k=3), NOISE, passes=6, warm=2)
    assert (found.sampler, found.window, found.passes) == (sampler.name, window, 6)
    assert found.shares.keys() == TITLES.keys() and sum(found.shares.values()) == pytest.approx(1)
    assert min(found.shares[g] for g in TITLES if g != HOST) > 0.0002
    assert found.launches > 50 and found.waits == found.copies_to_host == 0
    # The loop looks once whether all rows are done, and the CPU's session asks once how far they are.
    assert 0 < found.host_reads <= 3
    assert found.kernels and sum(found.kernels.values()) <= found.ms_per_pass * 5


def test_host_reads_are_seen() -> None:
    class Asking(Autoregressive):
        def step(self, session: Any, state: Any) -> None:
            super().step(session, state)
            for _ in range(3):
                int(session.lengths[0])

    plain, asking = (
        profile_passes(session(1), s, Target(), NOISE, passes=4, warm=1) for s in (Autoregressive(), Asking())
    )
    assert asking.host_reads == plain.host_reads + 3


def test_more_sampling_is_more_of_the_sampling_share() -> None:
    class Slow(Autoregressive):
        def step(self, session: Any, state: Any) -> None:
            super().step(session, state)
            torch.randn(800, 800) @ torch.randn(800, 800)  # a product that is none of the model's

    plain, slow = (
        profile_passes(session(1), s, Target(), NOISE, passes=4, warm=1).shares for s in (Autoregressive(), Slow())
    )
    # Against the model's products, because on a busy machine the host's share takes from all others.
    assert slow[SAMPLING] / slow[GEMM] > 2 * plain[SAMPLING] / plain[GEMM]


def test_profile_of_a_pipeline_with_a_drafter(text_pipe: TextToImagePipeline, drafters: list[Any]) -> None:
    text_pipe.load_drafter(drafters[0])
    found = profile_model(text_pipe, get_sampler("eagle"), passes=3, warm=1, seed=3)
    assert found.sampler == "eagle" and found.window > 5 and found.ms_per_pass > 0
    assert len(text_pipe("red heart", output_type="tokens").tokens) == 1  # the pipeline is as it was


def test_continuous_models_are_not_profiled() -> None:
    with pytest.raises(VisarError, match="discrete"):
        profile_model(ClassToImagePipeline(mar=class_mar(), vae=small_vae()), Autoregressive())


def test_ranges_leave_nothing_behind() -> None:
    before = [LlamaGenSession.forward, Target.probs, Autoregressive.step]
    session = LlamaGenSession.__new__(LlamaGenSession)
    with pytest.raises(KeyError), ranges(session, Autoregressive()):
        assert LlamaGenSession.forward is not before[0] and Autoregressive.step is not before[2]
        raise KeyError
    assert [LlamaGenSession.forward, Target.probs, Autoregressive.step] == before


def event(*names: str, **more: Any) -> Any:
    """An event under others, the outermost first."""
    made = None
    for name in names:
        made = SimpleNamespace(name=name, cpu_parent=made, **more)
    return made


@pytest.mark.parametrize(
    ("names", "group"),
    [
        ((VERIFY, MODEL_RANGE, "aten::linear", "aten::matmul", "aten::mm"), GEMM),
        ((VERIFY, MODEL_RANGE, "mkldnn::_linear_pointwise"), GEMM),
        ((VERIFY, MODEL_RANGE, "aten::addmm"), GEMM),
        ((VERIFY, MODEL_RANGE, "aten::_weight_int8pack_mm"), GEMM),
        ((VERIFY, MODEL_RANGE, "aten::scaled_dot_product_attention", "aten::mul"), "attention"),
        ((VERIFY, MODEL_RANGE, "aten::matmul", "aten::bmm"), "attention"),
        ((VERIFY, MODEL_RANGE, "aten::scaled_dot_product_attention", "aten::mm"), "attention"),
        ((VERIFY, MODEL_RANGE, "aten::softmax", "aten::_softmax"), "attention"),
        ((VERIFY, MODEL_RANGE, "aten::mul"), MODEL),
        ((VERIFY, MODEL_RANGE, TARGET_PROBS, "aten::mul"), SAMPLING),
        ((VERIFY, TARGET_PROBS, "aten::softmax"), SAMPLING),
        ((VERIFY, "aten::mm"), SAMPLING),
        ((VERIFY, MODEL_RANGE), HOST),
    ],
)
def test_groups_of_operators(names: tuple[str, ...], group: str) -> None:
    assert group_of_operator(event(*names)) == group


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", GEMM),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", GEMM),
        ("void gemvNSP_kernel<__nv_bfloat16>", GEMM),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("void at::native::sbtopk::gatherTopK<float>", SAMPLING),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>", SAMPLING),
        ("_target_probs", SAMPLING),  # our own kernels, by the names of their functions
        ("_guide", SAMPLING),
        ("_sample_gumbel", SAMPLING),
        ("_verify", SAMPLING),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", MODEL),
    ],
)
def test_groups_of_kernels_of_a_graph(kernel: str, group: str) -> None:
    assert group_of_kernel(kernel) == group


def test_groups_of_kernels_by_what_launched_them() -> None:
    elementwise, topk = "void at::native::vectorized_elementwise_kernel", "gatherTopK"
    assert group_of_launch(event(VERIFY, "aten::mul"), elementwise) == SAMPLING
    assert group_of_launch(event(VERIFY, MODEL_RANGE, "aten::mul"), elementwise) == MODEL
    assert group_of_launch(event(VERIFY, MODEL_RANGE), "decode_attention_kernel") == "attention"  # a Triton kernel
    assert group_of_launch(event(VERIFY, MODEL_RANGE), elementwise) == MODEL
    assert group_of_launch(event(VERIFY), elementwise) == SAMPLING
    assert group_of_launch(event(profiling.WINDOW), topk) == SAMPLING  # a graph's launch
    assert group_of_launch(event(profiling.WINDOW), "nvjet_tst") == GEMM


def test_shares_of_a_gpu() -> None:
    """Kernels by operator, those of a graph by name, and what they leave of the pass to the host."""
    kernel = SimpleNamespace
    operators = [
        event(VERIFY, MODEL_RANGE, "aten::linear", kernels=[kernel(name="nvjet", duration=300.0)]),
        event(VERIFY, "aten::mul", kernels=[kernel(name="elementwise", duration=100.0)]),
    ]
    kernels = [
        SimpleNamespace(name="nvjet", device_time_total=300.0),
        SimpleNamespace(name="nvjet", device_time_total=200.0),
        SimpleNamespace(name="elementwise", device_time_total=100.0),
    ]
    shares = profiling._gpu_shares(operators, kernels, 1.0)
    assert shares == pytest.approx({"attention": 0, GEMM: 0.5, MODEL: 0, SAMPLING: 0.1, HOST: 0.4})
