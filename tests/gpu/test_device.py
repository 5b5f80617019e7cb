"""What only a GPU can show: streams, graphs, synchronisation, memory, sizes, several devices, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc
from fastcompat import _native, functional

pytestmark = pytest.mark.usefixtures("a_gpu")
CYCLES = 200_000_000  # about a tenth of a second of doing nothing


@pytest.fixture
def a_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.fail("these tests need a GPU: leave test_device.py out with --device cpu")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Torch raises on everything that waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def unit(rows: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return F.normalize(torch.randn(rows, dim, device="cuda")).to(dtype)


def training_step(query: Tensor, keys: Tensor, labels: Tensor, temperature: Tensor) -> list[Tensor]:
    loss = functional.contrastive_loss(
        query, keys, query_labels=labels, key_labels=labels, temperature=temperature, backend="native"
    )
    loss = loss + functional.ract_loss(query, keys, labels, k=5, backend="native")
    return [loss.detach(), *torch.autograd.grad(loss, (query, keys, temperature))]


@pytest.fixture
def step() -> tuple[Tensor, ...]:
    temperature = torch.tensor(0.1, device="cuda")
    query, keys = unit(200), unit(200)
    return (
        query.requires_grad_(), keys.requires_grad_(), torch.arange(200, device="cuda") % 17,
        temperature.requires_grad_(),
    )  # fmt: skip


def test_the_module_has_kernels_for_this_gpu(device: torch.device) -> None:
    assert fc.build_info()["cuda"]
    assert _native.not_covered(device) == ""


def test_losses_never_wait(step: tuple[Tensor, ...], no_waiting: None) -> None:
    training_step(*step)


def test_work_follows_the_current_stream() -> None:
    query, keys = unit(64), unit(1_000)
    expected = fc.softmax_stats(query, keys).neg_lse, *fc.topk(query, keys, 5)
    late_query, late_keys = torch.full_like(query, torch.nan), torch.full_like(keys, torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        late_query.copy_(query)
        late_keys.copy_(keys)
        found = fc.softmax_stats(late_query, late_keys).neg_lse, *fc.topk(late_query, late_keys, 5)
    side.synchronize()
    for mine, right in zip(found, expected, strict=True):
        assert torch.equal(mine, right)


def test_two_streams_at_once_do_not_share_scratch() -> None:
    inputs = [(unit(500), unit(20_000)) for _ in range(4)]
    expected = [fc.topk(*x, 20, backend="native") for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = [[] for _ in inputs]
    for _ in range(10):
        for x, stream, results in zip(inputs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(fc.softmax_stats(*x).neg_lse)
                results.append(fc.topk(*x, 20)[1])
    torch.cuda.synchronize()
    for (_, ids), results in zip(expected, found, strict=True):
        assert all(torch.equal(results[0], again) for again in results[::2])
        assert all(torch.equal(ids, again) for again in results[1::2])


def test_a_graph_replays_a_training_step(step: tuple[Tensor, ...]) -> None:
    query, keys, labels, temperature = step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step(*step)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = training_step(*step)
    with torch.no_grad():
        query.copy_(unit(200))
        keys.copy_(unit(200))
        temperature.fill_(0.2)
        labels.copy_(labels.flip(0))
    graph.replay()
    for replayed, right in zip(recorded, training_step(*step), strict=True):
        assert torch.equal(replayed, right)


def test_a_graph_replays_a_search() -> None:
    query, keys = unit(50), unit(3_000)
    fc.topk(query, keys, 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, ids = fc.topk(query, keys, 7, backend="native")
    query.copy_(unit(50))
    graph.replay()
    right = fc.topk(query, keys, 7, backend="native")
    assert torch.equal(scores, right[0])
    assert torch.equal(ids, right[1])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_step(step: tuple[Tensor, ...], mode: str) -> None:
    def loss(query: Tensor, keys: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        return functional.contrastive_loss(
            query, keys, query_labels=labels, key_labels=labels, temperature=temperature, backend="native"
        )

    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    wanted = (step[0], step[1], step[3])
    right = torch.autograd.grad(loss(*step), wanted)
    for _ in range(3):
        found = [g.clone() for g in torch.autograd.grad(compiled(*step), wanted)]
    for mine, plain in zip(found, right, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(64, 64).cuda()
    inputs, gallery, positive = unit(100, dtype=torch.float32), unit(400), torch.arange(100, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        query = layer(inputs)
        assert query.dtype == dtype
        loss = functional.contrastive_loss(query, gallery.float(), positive=positive, backend="native")
    assert loss.dtype == torch.float32
    loss.backward()
    right = functional.contrastive_loss(
        query.detach().double(), gallery.to(dtype).double(), positive=positive, backend="reference"
    )
    torch.testing.assert_close(loss.detach().double(), right, rtol=1e-2, atol=1e-2)
    assert layer.weight.grad.isfinite().all()


def test_every_gpu() -> None:
    for index in range(torch.cuda.device_count()):
        where = torch.device("cuda", index)
        query, keys = unit(30).to(where).requires_grad_(), unit(300).to(where)
        stats = fc.softmax_stats(query, keys, backend="native")
        torch.autograd.grad(stats.neg_lse.sum(), query)
        right = fc.softmax_stats(query.detach().cpu().double(), keys.cpu().double())
        assert stats.neg_lse.device == where
        torch.testing.assert_close(stats.neg_lse.detach().cpu().double(), right.neg_lse, rtol=1e-5, atol=1e-5)
        assert fc.topk(query, keys, 3)[1].device == where
    assert torch.cuda.current_device() == 0


def test_tensors_on_two_devices_are_refused() -> None:
    query, keys, labels = unit(4), unit(9), torch.zeros(9, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="`keys` must be on the device of `query`"):
        fc.softmax_stats(query, keys.cpu())
    with pytest.raises(ValueError, match="`key_labels` must be on the device of `keys`"):
        fc.softmax_stats(query, keys, query_labels=labels[:4], key_labels=labels.cpu())
    with pytest.raises(ValueError, match="`exclude` must be on the device of `query`"):
        fc.topk(query, keys, 3, exclude=labels[:4].cpu())
    with pytest.raises(ValueError, match="must be on the device of"):
        fc.retrieval_metrics(query, keys, labels[:4].cpu(), labels)
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        torch.ops.fastcompat.pair_scores(query, keys, torch.zeros(4, 1, dtype=torch.int64), "ip")


def test_a_scale_on_the_cpu_is_taken_along() -> None:
    query, keys, scale = unit(20).requires_grad_(), unit(70), torch.tensor(3.0, requires_grad=True)
    stats = fc.softmax_stats(query, keys, scale=scale, backend="native")
    plain = fc.softmax_stats(query, keys, scale=3.0, backend="native")
    assert torch.equal(stats.neg_lse, plain.neg_lse)
    (gradient,) = torch.autograd.grad(stats.neg_lse.sum(), scale)
    assert gradient.device.type == "cpu"


def test_an_index_out_of_range_makes_its_row_nan_and_no_other() -> None:
    query, keys = unit(70).requires_grad_(), unit(300).requires_grad_()
    positive = torch.arange(70, device="cuda")
    right = fc.softmax_stats(query, keys, positive=positive, backend="native")
    for name in ("positive", "exclude"):
        index = positive.clone() if name == "positive" else torch.full_like(positive, -1)
        index[[3, 69]] = torch.tensor([300, 2**40], device="cuda")
        sets = {"positive": positive, "exclude": None} | {name: index}
        stats = fc.softmax_stats(query, keys, **sets, backend="native")
        assert stats.neg_lse[[3, 69]].isnan().all() and stats.pos_lse[[3, 69]].isnan().all()
        assert stats.pos_count[[3, 69]].tolist() == [1, 1]
        rest = torch.ones(70, dtype=torch.bool, device="cuda")
        rest[[3, 69]] = False
        assert torch.equal(stats.neg_lse[rest], right.neg_lse[rest])
        # What such a row's loss sends back reaches nobody, as in the reference.
        found, truth = (
            torch.autograd.grad((part.neg_lse - part.pos_lse).sum(), (query, keys))
            for part in (stats, fc.softmax_stats(query, keys, **sets, backend="reference"))
        )
        assert not found[0][[3, 69]].any()
        for mine, plain in zip(found, truth, strict=True):
            assert (mine - plain).float().norm() <= 1e-2 * plain.float().norm()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"`exclude` must hold -1 \(none\) or row numbers below 300"):
        fc.topk(query, keys, 3, exclude=index)


def test_nan_passes_through_losses_and_is_refused_by_searches() -> None:
    query, keys = unit(40), unit(500)
    keys[77, 3] = torch.nan
    assert fc.softmax_stats(query, keys, backend="native").neg_lse.isnan().all()
    with pytest.raises(ValueError, match=r"`keys` must be finite: row 77 holds NaN or inf"):
        fc.topk(query, keys, 3, backend="native")
    query[5, 0] = torch.inf
    with pytest.raises(ValueError, match=r"`query` must be finite: row 5 holds"):
        fc.ranks(query, keys, torch.zeros(40, 1, dtype=torch.int64, device="cuda"), backend="native")
    loss = functional.ract_loss(query, query, torch.arange(40, device="cuda"), k=3, backend="native")
    assert loss.isnan()


def test_any_layout() -> None:
    wide = torch.randn(300, 150, device="cuda", dtype=torch.bfloat16)
    query, keys = wide[:40, 3:68], wide[40:, 3:68]  # odd offsets and strides
    right = fc.softmax_stats(query.contiguous(), keys.contiguous(), backend="native")
    assert torch.equal(fc.softmax_stats(query, keys, backend="native").neg_lse, right.neg_lse)
    columns = wide.T.contiguous().T  # neighbours in a row are far apart
    again = fc.softmax_stats(columns[:40, 3:68], columns[40:, 3:68], backend="native")
    assert torch.equal(again.neg_lse, right.neg_lse)
    for mine, plain in zip(
        fc.topk(query, keys, 9), fc.topk(query.contiguous(), keys.contiguous(), 9), strict=True
    ):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize(("precision", "allowed"), [("highest", 2e-6), ("high", 2e-5), ("medium", 2e-2)])
def test_float32_follows_torchs_precision(precision: str, allowed: float) -> None:
    query, keys = unit(100, 256, torch.float32).requires_grad_(), unit(2_000, 256, torch.float32)
    right = fc.softmax_stats(query.detach().double(), keys.double(), scale=10.0).neg_lse
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = fc.softmax_stats(query, keys, scale=10.0, backend="native").neg_lse
        ids = fc.topk(query, keys, 10, metric="ip", backend="native")[1]
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found - right).abs().max() <= allowed
    assert torch.equal(ids, fc.topk(query, keys, 10, metric="ip", backend="native")[1])  # always exact


@pytest.mark.parametrize("dim", [64, 128, 200, 256, 512, 1024, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_tier_at_working_sizes(dim: int, dtype: torch.dtype) -> None:
    query, keys = unit(1_000, dim, dtype).requires_grad_(), unit(5_000, dim, dtype).requires_grad_()
    positive = torch.randperm(5_000, device="cuda")[:1_000]
    wide = [x.detach().double().requires_grad_() for x in (query, keys)]
    results = []
    for pair, backend in (((query, keys), "native"), (wide, "reference")):
        stats = fc.softmax_stats(*pair, scale=14.0, positive=positive, backend=backend)
        gradients = torch.autograd.grad((stats.neg_lse - stats.pos_lse).mean(), pair)
        results.append([stats.neg_lse.detach(), stats.pos_lse.detach(), *gradients])
    for mine, right in zip(*results, strict=True):
        error = (mine.double() - right).norm() / right.norm()
        assert error <= (2e-6 if dtype == torch.float32 or mine.dim() == 1 else torch.finfo(dtype).eps)


def test_more_pairs_than_31_bits_can_number() -> None:
    query, keys = unit(32_768), unit(1_000_000)
    positive = torch.randint(1_000_000, (32_768,), device="cuda")
    stats = fc.softmax_stats(query, keys, scale=14.0, positive=positive, backend="native")
    scores, ids = fc.topk(query, keys, 5, metric="ip", backend="native")
    for row in (0, 1, 16_383, 32_767):
        z = 14 * (keys.double() @ query[row].double())
        assert stats.pos_lse[row].sub(z[positive[row]]).abs() < 1e-4
        z[positive[row]] = -torch.inf
        assert stats.neg_lse[row].sub(z.logsumexp(0)).abs() < 1e-4
        best = (keys.float() @ query[row].float()).topk(5)
        torch.testing.assert_close(scores[row], best.values, rtol=1e-5, atol=1e-6)
        assert len(set(ids[row].tolist())) == 5


def test_more_elements_than_31_bits_can_number() -> None:
    keys = torch.randn(9_000_000, 256, device="cuda", dtype=torch.bfloat16)
    query = keys[[0, 4_444_444, 8_999_999]]
    assert fc.topk(query, keys, 1, backend="native")[1][:, 0].tolist() == [0, 4_444_444, 8_999_999]
    # Half a row's product with itself, 128, outweighs nine million others of about 8 in size.
    stats = fc.softmax_stats(query, keys, scale=0.5, backend="native")
    right = 0.5 * query.double().square().sum(1)
    torch.testing.assert_close(stats.neg_lse.double(), right, rtol=1e-5, atol=0)


def test_memory_is_linear_in_the_rows() -> None:
    query, keys = unit(8_192, 128).requires_grad_(), unit(262_144, 128).requires_grad_()
    positive = torch.arange(8_192, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = functional.contrastive_loss(query, keys, positive=positive, normalize=False, backend="native")
    found = torch.autograd.grad(loss, (query, keys))
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in found)
    logits = query.shape[0] * keys.shape[0] * 4
    assert extra < logits / 50, f"{extra >> 20} MiB beside {logits >> 20} MiB of logits"


def test_out_of_memory_is_an_exception_and_the_next_call_works() -> None:
    query, keys = unit(100), unit(5_000)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((total - free + (64 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fc.topk(query, keys, 10_000_000, backend="native")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert fc.topk(query, keys, 5, backend="native")[1].shape == (100, 5)
