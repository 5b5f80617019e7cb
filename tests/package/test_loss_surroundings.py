"""Every loss in whatever torch puts around it: autocast, anomaly mode, odd tensors, mixed dtypes."""

from __future__ import annotations

import warnings

import pytest
import torch
from loss_cases import FROM_PAIRS, LOSSES, NORMALISING, value_and_gradients
from torch import Tensor

import fastcompat as fc
from fastcompat import functional, losses

ALL = LOSSES | FROM_PAIRS
BACKENDS = ("native", "reference")
pytestmark = pytest.mark.filterwarnings("ignore:no row of this batch", "ignore:.*negative labels")


def batch(dtype: torch.dtype = torch.float32, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(3)
    new, old = (torch.randn(rows, 24, generator=gen, dtype=torch.float32).to(dtype) for _ in range(2))
    return new, old, torch.arange(rows) % 4


def options(name: str, backend: str) -> dict[str, str]:
    return {} if name in FROM_PAIRS else {"backend": backend}


def truth(name: str, new: Tensor, old: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().double().requires_grad_() for x in (new, old)]
    return value_and_gradients(ALL[name](*leaves, y), leaves)


def error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Of the gradients together, relative to the largest of them."""
    size = max(float(x.norm()) for x in exact)
    return max(float((a - b).norm()) for a, b in zip(ours, exact, strict=True)) / size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ALL)
def test_autocast_does_not_reach_into_a_loss(name: str, autocast: torch.dtype, backend: str) -> None:
    """float32 embeddings that are both trained stay float32: value and gradient to float32's rounding."""
    new, old, y = batch()
    leaves = [new.requires_grad_(), old.requires_grad_()]
    with torch.autocast("cpu", autocast):
        loss = ALL[name](*leaves, y, **options(name, backend))
        inside = value_and_gradients(loss, leaves)  # backward within the region, too
    value, exact = truth(name, new, old, y)
    torch.testing.assert_close(inside[0], value, rtol=2e-6, atol=1e-5)
    assert error(inside[1], exact) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ALL)
def test_autocast_of_16_bit_embeddings(name: str, autocast: torch.dtype, backend: str) -> None:
    """Against float64 of the rounded inputs: what 16 bits of unit vectors and of a gradient cost."""
    new, old, y = batch(autocast)
    leaves = [new.requires_grad_(), old.requires_grad_()]
    with torch.autocast("cpu", autocast):
        loss = ALL[name](*leaves, y, **options(name, backend))
        value, grads = value_and_gradients(loss, leaves)
    assert loss.dtype == torch.float32
    expected, exact = truth(name, new, old, y)
    eps = torch.finfo(autocast).eps
    # A cosine is off by eps at most, a logit by 1 / temperature (or the scale 30) times that.
    assert abs(value - expected) < 30 * eps * max(1.0, float(expected.abs()) / 10)
    assert error(grads, exact) < 30 * eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", ("one class", "all distinct", "no class", "some class"))
@pytest.mark.parametrize("name", ALL)
def test_anomaly_mode_finds_nothing(name: str, labels: str, backend: str) -> None:
    new, old, _ = batch(rows=5)
    y = {
        "one class": torch.zeros(5, dtype=torch.int64),
        "all distinct": torch.arange(5),
        "no class": torch.full((5,), -1),
        "some class": torch.tensor([0, 0, -1, 1, 2]),
    }[labels]
    leaves = [new.requires_grad_(), old.requires_grad_()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection")
        with torch.autograd.detect_anomaly(check_nan=True):
            value, grads = value_and_gradients(ALL[name](*leaves, y, **options(name, backend)), leaves)
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arriving", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("name", ["contrastive none", "contrastive plain none"])
def test_a_row_without_positives_sends_nothing(name: str, arriving: float, backend: str) -> None:
    new, old, _ = batch(rows=5)
    y = torch.tensor([0, 0, 1, 1, -1])
    leaves = [new.requires_grad_(), old.requires_grad_()]
    loss = LOSSES[name](*leaves, y, backend=backend)
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, arriving])
    grads = torch.autograd.grad(loss, leaves, weight)
    expected = torch.autograd.grad(
        LOSSES[name](*leaves, y, backend=backend), leaves, torch.tensor([1.0, 1, 1, 1, 0])
    )
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert grads[0][4].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ("new", "old"))
@pytest.mark.parametrize("name", ALL)
def test_what_inference_mode_made_is_trained_against(name: str, trained: str, backend: str) -> None:
    with torch.inference_mode():
        new, old, y = batch()
    frozen = new, old, y
    new, old, y = (x.clone() for x in frozen)
    which = 0 if trained == "new" else 1
    leaf = (new, old)[which].requires_grad_()
    given = [leaf, frozen[1]] if which == 0 else [frozen[0], leaf]
    plain = [leaf, old] if which == 0 else [new, leaf]
    how = options(name, backend)
    expected = ALL[name](*plain, y, **how)
    ours = ALL[name](*given, frozen[2], **how)
    assert ours.requires_grad == expected.requires_grad
    if expected.requires_grad:
        (a, (b,)), (c, (d,)) = (value_and_gradients(loss, [leaf]) for loss in (ours, expected))
        assert torch.equal(a, c) and torch.equal(b, d)


def test_modules_built_and_filled_in_inference_mode() -> None:
    new, old, y = batch()
    with torch.inference_mode():
        prototypes = fc.class_prototypes(old, y, 4)
        loss = losses.PrototypeLoss(fc.PrototypeBank(prototypes))
        loss.bank.refresh(fc.class_prototypes(new, y, 4), 0)
        loss.perturbed = fc.odpp(prototypes, prototypes.roll(1, 0), steps=2)
        queue = losses.MemoryQueue(20, 24)
        queue.add(old, y)
        temperature = torch.tensor(0.1)
    state = [x.clone() for x in loss.buffers()]
    loss.bank.refresh(prototypes, 1)
    loss.load_state_dict(dict(zip(loss.state_dict(), state, strict=True)))
    x = new.requires_grad_()
    value = loss(x, y) + functional.contrastive_loss(
        x, queue.embeddings, query_labels=y, key_labels=queue.labels, temperature=temperature
    )
    assert torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMALISING)
def test_a_zero_row_in_float16_has_a_finite_gradient(name: str, backend: str) -> None:
    new, old, y = batch(torch.float16)
    new[2], old[5] = 0, 0
    leaves = [new.requires_grad_(), old.requires_grad_()]
    loss = NORMALISING[name](*leaves, y, backend=backend)
    value, grads = value_and_gradients(loss, leaves)
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert any(grad[row].any() for grad, row in zip(grads, (2, 5), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMALISING)
def test_eps_is_what_short_rows_are_divided_by(name: str, backend: str) -> None:
    """Rows of norm 0.1 below eps = 0.5 count as rows of norm 0.2 of unit vectors."""
    new, old, y = batch()
    unit = torch.nn.functional.normalize(new)
    short = torch.where((torch.arange(len(new)) < 3)[:, None], 0.1 * unit, unit)
    halves = torch.where((torch.arange(len(new)) < 3)[:, None], 0.2 * unit, unit)
    old = torch.nn.functional.normalize(old)
    ours = NORMALISING[name](short, old, y, eps=0.5, backend=backend)
    if name in ("contrastive", "contrastive none", "bct cosine"):
        how = {"normalize": False} if name != "bct cosine" else {}
        if name == "bct cosine":
            z = 30 * halves @ torch.cat([old, -old.flip(0)]).T
            expected = torch.nn.functional.cross_entropy(z, y)
        else:
            expected = NORMALISING[name](halves, old, y, backend=backend, **how)
        torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours, NORMALISING[name](short, old, y, backend=backend))
    with pytest.raises(ValueError, match="`eps` must be above 0: got 0"):
        NORMALISING[name](new, old, y, eps=0.0, backend=backend)


@pytest.mark.parametrize("dtypes", ((torch.float16, torch.float32), (torch.float32, torch.bfloat16)))
@pytest.mark.parametrize("name", ALL)
def test_mixed_dtypes_are_promoted(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    new, old, y = batch()
    leaves = [x.to(dtype).requires_grad_() for x, dtype in zip((new, old), dtypes, strict=True)]
    loss = ALL[name](*leaves, y, **options(name, "auto"))
    value, grads = value_and_gradients(loss, leaves)
    expected, exact = truth(name, *leaves, y)
    assert loss.dtype == torch.float32
    # Where new embeddings meet new ones there is nothing to promote: unit vectors are rounded to their dtype.
    itself = name.startswith(("contrastive itself", "ract", "metric-compatible"))
    close = 10 * torch.finfo(dtypes[0]).eps if itself else 1e-5
    torch.testing.assert_close(value, expected, rtol=close, atol=1e-5)
    assert error(grads, exact) < 2e-2  # a gradient is rounded to 8 bits of precision


@pytest.mark.parametrize("name", LOSSES)
def test_several_gradients_at_once(name: str) -> None:
    """`is_grads_batched` gives what one gradient after the other gives."""
    new, old, y = batch()
    loss = LOSSES[name](new.requires_grad_(), old, y).sum()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        (both,) = torch.autograd.grad(
            loss, new, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True
        )
    (one,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(both, torch.stack([one, -2 * one]))


def test_derivatives_of_the_reference_under_autocast() -> None:
    """Its product is a function of its own there: twice, forward-mode and under vmap, as without autocast."""
    new, old, y = (x.double() if x.is_floating_point() else x for x in batch(rows=4))

    def loss(x: Tensor, z: Tensor) -> Tensor:
        return functional.contrastive_loss(x, z, query_labels=y, key_labels=y, backend="reference")

    x, z = new[:, :3].clone().requires_grad_(), old[:, :3].clone().requires_grad_()
    expected = torch.func.hessian(loss)(x.detach(), z.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.autograd.gradcheck(loss, (x, z), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(loss, (x, z))
        torch.testing.assert_close(torch.func.hessian(loss)(x.detach(), z.detach()), expected)
        several = torch.func.vmap(loss, in_dims=(0, None))(torch.stack([x, 2 * z]), z)
    torch.testing.assert_close(several, torch.stack([loss(x, z), loss(2 * z, z)]))


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_torch_func_are_refused_with_the_way_out(name: str) -> None:
    new, old, y = batch()
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match='backend="reference"'):
            transform(lambda x: LOSSES[name](x, old, y).sum())(new)
        assert transform(lambda x: LOSSES[name](x, old, y, backend="reference").sum())(new).shape == new.shape


@pytest.mark.parametrize("name", LOSSES)
def test_meta_tensors(name: str) -> None:
    new, old, y = (x.to("meta") for x in batch())
    with pytest.raises(ValueError, match=r'meta.*backend="reference"'):
        LOSSES[name](new, old, y)
    assert LOSSES[name](new, old, y, backend="reference").is_meta


@pytest.mark.parametrize("name", LOSSES)
def test_bits_that_torch_resolves_late(name: str) -> None:
    """A view that is negated when it is read, and a tensor of zeros that has no memory."""
    new, old, y = batch()
    late = torch.complex(torch.zeros_like(old), -old).conj().imag
    assert late.is_neg() and torch.equal(late, old)
    for given, plain in ((late, old), (torch._efficientzerotensor(old.shape), torch.zeros_like(old))):
        for backend in BACKENDS:
            expected = LOSSES[name](new, plain, y, backend=backend)
            torch.testing.assert_close(LOSSES[name](new, given, y, backend=backend), expected)
    ids = fc.topk(new, old, 3)[1]
    assert torch.equal(fc.topk(late, new, 3)[1], fc.topk(old, new, 3)[1])
    assert torch.equal(fc.topk(new, late, 3)[1], ids)
    assert torch.equal(fc.ranks(new, late, ids), fc.ranks(new, old, ids))
    gallery = fc.MixedGallery(late)
    for _ in range(3):  # the later searches read a packed copy
        assert torch.equal(gallery.search(new, None, 3)[1], ids)


@pytest.mark.parametrize(
    ("x", "message"),
    (
        (torch.nested.nested_tensor([torch.zeros(24)] * 12), "nested tensor; pad it"),
        (
            torch.masked.masked_tensor(torch.zeros(12, 24), torch.ones(12, 24).bool()),
            "masked tensor; fill it",
        ),
        (torch.zeros(12, 24).to_sparse(), "dense: got torch.sparse_coo"),
        (torch.zeros(12, 24).to_mkldnn(), "dense: got torch._mkldnn"),
        (torch._to_functional_tensor(torch.zeros(12, 24)), 'backend="reference"'),
    ),
    ids=("nested", "masked", "sparse", "mkldnn", "functional"),
)
def test_tensors_without_plain_memory(x: Tensor, message: str) -> None:
    new, old, y = batch()
    for call in (
        lambda: functional.contrastive_loss(x, old, query_labels=y, key_labels=y, normalize=False),
        lambda: functional.contrastive_loss(new, x, query_labels=y, key_labels=y, normalize=False),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_fake_tensors() -> None:
    """Shapes without values, as torch's own tools run a model: no value may be read, forward or backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        new, old, y = torch.randn(12, 24, requires_grad=True), torch.randn(12, 24), torch.zeros(12).long()
        for loss in LOSSES.values():
            assert torch.autograd.grad(loss(new, old, y).sum(), new)[0].shape == (12, 24)


@pytest.mark.parametrize("value", (-0.1, 0.0, torch.nan))
def test_a_temperature_that_left_its_range(value: float) -> None:
    new, old, y = batch()
    for given in (value, torch.tensor(value), torch.nn.Parameter(torch.tensor(value))):
        for name, loss in NORMALISING.items():
            if "margin" in name or "bct" in name:
                continue
            with pytest.raises(ValueError, match="`temperature` must be above 0: got"):
                loss(new, old, y, temperature=given)
        with pytest.raises(ValueError, match="`scale` must be above 0: got"):
            NORMALISING["margin"](new, old, y, scale=given)
    compiled = torch.compile(
        lambda t: functional.contrastive_loss(new, old, query_labels=y, key_labels=y, temperature=t),
        fullgraph=True,
        backend="eager",
    )
    compiled(torch.tensor(value))  # no value is read here
