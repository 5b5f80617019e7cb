"""The examples run, and compute what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def functions(request):
    return runpy.run_path(str(EXAMPLES / request.param))


@pytest.mark.parametrize("name", ["ract_forms.py", "unibct_prototypes.py"])
def test_runs(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("functions", ["ract_forms.py"], indirect=True)
def test_ract_triplet(functions):
    new, old = torch.randn(14, 6, dtype=torch.float64, requires_grad=True), torch.randn(14, 6).double()
    labels = torch.tensor([0] * 9 + [1, 1, 2, 2, -1])  # class 0 has fewer negatives than k
    n, o = F.normalize(new), F.normalize(old)
    hinges = []
    for i in range(14):
        for bank in (o, n.detach()):
            other = [j for j in range(14) if j != i and (labels[j] != labels[i] or labels[i] < 0)]
            far = torch.stack([(n[i] - bank[j]).norm() for j in other]).sort().values[:7]
            hinges.append(((n[i] - o[i]).norm() - far + 0.3).relu())
    expected = torch.cat(hinges).mean()
    ours = functions["ract_triplet"](new, old, labels, margin=0.3, k=7)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, new), torch.autograd.grad(expected, new))


@pytest.mark.parametrize("functions", ["ract_forms.py"], indirect=True)
def test_ract_bct(functions):
    new, labels = torch.randn(14, 6, dtype=torch.float64, requires_grad=True), torch.randint(5, (14,))
    old_weight, new_weight = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z_new = new @ new_weight.T
    z_new = z_new.scatter(1, labels[:, None], -torch.inf)
    expected = F.cross_entropy(torch.cat([new @ old_weight.detach().T, z_new], 1), labels)
    ours = functions["ract_bct"](new, labels, old_weight, new_weight)
    torch.testing.assert_close(ours, expected)
    inputs = (new, new_weight)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("functions", ["unibct_prototypes.py"], indirect=True)
def test_refined_prototypes(functions):
    """The inverse is the sum of all walks over the graph: 1 + lam E + (lam E)^2 + ..."""
    old, new = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0, 1, 3, 3, 0, 3, 0, -1])
    ours = functions["refined_prototypes"](old, new, labels, 5, lam=0.5)
    rows = [i for i in range(11) if labels[i] == 0]
    x = F.normalize(new)
    e = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for a, i in enumerate(rows):
        weights = torch.tensor([0.0 if i == j else float((x[i] @ x[j] / 0.05).exp()) for j in rows])
        e[a] = weights.double() / weights.sum().double()
    walk = total = F.normalize(old)[rows]
    for _ in range(80):
        walk = 0.5 * e @ walk
        total = total + walk
    torch.testing.assert_close(ours[0], F.normalize((0.5 * total).mean(0), dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], F.normalize(old[4], dim=0))
    assert ours[[2, 4]].eq(0).all()
