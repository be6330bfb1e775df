"""What the operators accept, and the one line that answers anything else."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from aha import kernels, regions
from aha.kernels import functional

SCORES = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))


def rank(**changes):
    return kernels.soft_rank(**{"values": SCORES} | changes)


def masks(**changes):
    return kernels.soft_topk_masks(**{"scores": SCORES, "fractions": [0.5], "tau": 0.3, "seed": 0} | changes)


@pytest.mark.parametrize("operator", [rank, masks])
@pytest.mark.parametrize(
    ("tau", "message"),
    [
        ("0.1", r"tau='0\.1': give a number"),
        (None, "tau=None: give a number"),
        (True, "tau=True: give a number"),
        (1j, "tau=1j: give a number"),
        ([0.1], r"tau=\[0\.1\]: give a number"),
        (1e-300, "tau=1e-300 is not a number that float32 holds"),
        (1e-30, r"which float32 resolves to .* only: raise tau"),
        (float("inf"), "finite and > 0"),
        (torch.tensor(float("nan")), "finite and > 0"),
        (torch.tensor(1j), "tau is complex64"),
        (torch.tensor(0.1).to_sparse(), "tau is sparse_coo float32"),
        (torch.tensor(0.1, device="meta"), "tau is float32 .* on meta"),
    ],
)
def test_a_wrong_temperature(operator, tau, message):
    with pytest.raises(ValueError, match=message) as caught:
        operator(tau=tau)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks(noise=None), "noise=None: .* must be a number"),
        (lambda: masks(noise="a"), "noise='a'"),
        (lambda: masks(noise=float("nan")), "noise=nan"),
        (lambda: masks(noise=torch.tensor(0.1)), "noise=float32 of shape"),
        (lambda: masks(noise=1e30), "resolves to"),
        (lambda: masks(seed=3.0), r"seed=3\.0: give an integer in 0"),
        (lambda: masks(seed=True), "seed=True"),
        (lambda: masks(seed=2**64), "seed=18446744073709551616"),
        (lambda: masks(seed=torch.tensor(3.0)), "seed is float32"),
        (lambda: masks(n_iters=3.0), r"n_iters=3\.0: give an integer in 1 … 1000000"),
        (lambda: masks(n_iters=True), "n_iters=True"),
        (lambda: rank(n_iters=None), "n_iters=None"),
        (lambda: kernels.log_sinkhorn(LOGITS, "3"), "n_iters='3'"),
        (lambda: kernels.soft_topk(SCORES, None), "k=None: give an integer in 0 … 16, the number of values"),
        (lambda: kernels.soft_topk(SCORES, 17), "k=17"),
        (lambda: kernels.soft_topk(SCORES, np.int64(-1)), r"k=np\.int64\(-1\)|k=-1"),
        (lambda: masks(fractions="ab"), "fractions='ab': give a 1-dim sequence"),
        (lambda: masks(fractions=None), "fractions=None"),
        (lambda: masks(fractions=[1j]), "fractions is complex64"),
        (lambda: masks(fractions=[True]), "fractions is bool"),
        (lambda: masks(fractions=torch.linspace(0, 1, 3, device="meta")), "fractions is float32 .* on meta"),
        (lambda: kernels.soft_sort(SCORES[0]), r"values is float32 of shape \(16,\): give a 2-dim"),
        (lambda: kernels.soft_rank(SCORES[:, :0]), r"values has shape \(3, 0\)"),
        (lambda: kernels.log_sinkhorn(LOGITS[:, :0, :0]), "K ≥ 1"),
        (lambda: rank(backend=None), "backend=None is not known"),
        (lambda: kernels.explain("soft_rank", SCORES, "a"), "tau='a'"),
    ],
)
def test_wrong_arguments_of_rankings(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


UNUSUAL = {
    "sparse_coo float32": lambda x: x.to_sparse(),
    "sparse_csr float32": lambda x: x.to_sparse_csr(),
    "on meta, without values": lambda x: x.to("meta"),
    "complex64": lambda x: x + 0j,
    "a nested tensor": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "qint8": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "bool": lambda x: x > 0,
    "float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
    "a ndarray": lambda x: x.numpy(),
    "a NoneType": lambda x: None,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_tensors(what):
    calls = {
        "values": (kernels.soft_rank, kernels.soft_sort, lambda x: kernels.soft_topk(x, 2)),
        "scores": (lambda x: masks(scores=x), lambda x: kernels.gumbel_sinkhorn(x, 0.3)),
        "logits": (kernels.log_sinkhorn,),
        "permutation": (lambda x: kernels.cumulative_masks(x, [0.5]),),
    }
    for name, operators in calls.items():
        given = UNUSUAL[what](SCORES if name in ("values", "scores") else LOGITS)
        for operator in operators:
            with pytest.raises(ValueError, match=f"^{name} is .*{what}.*: give a .-dim tensor of float32") as caught:
                operator(given)
            assert "\n" not in str(caught.value)


def test_numpy_numbers_are_numbers():
    expected = kernels.soft_topk(SCORES, 3, 0.25, 20)
    assert torch.equal(kernels.soft_topk(SCORES, np.int64(3), np.float32(0.25), np.int32(20)), expected)
    expected = masks(noise=0.5, seed=7, n_iters=4)
    assert torch.equal(masks(noise=np.float64(0.5), seed=np.uint64(7), n_iters=np.int64(4)), expected)
    assert torch.equal(masks(fractions=np.array([0.5], dtype=np.float32)), masks())
    assert torch.equal(masks(tau=torch.tensor(1)), masks(tau=1.0))


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e38, 1e-30, 1e-37])
def test_scale_does_not_matter(scale):
    values = (SCORES * scale).requires_grad_()
    ranks, ordered = kernels.soft_rank(values), kernels.soft_sort(values)
    torch.testing.assert_close(ranks, kernels.soft_rank(SCORES), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ordered / scale, kernels.soft_sort(SCORES), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.soft_topk(values, 3), kernels.soft_topk(SCORES, 3), rtol=1e-5, atol=1e-5)
    # d rank / d value goes with 1 / scale: through both, the scale cancels
    (gradient,) = torch.autograd.grad(ranks[:, 0].sum(), values)
    plain = SCORES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kernels.soft_rank(plain)[:, 0].sum(), plain)
    torch.testing.assert_close(gradient.double() * scale, expected.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1e37, 1e30, 1.0, 1e-30, 1e-37])
def test_the_gradient_of_a_sort_does_not_depend_on_the_scale(scale, noise, backend):
    """Also where that of a score, the scale over τ, is no number of float32, and beside a row of a smaller scale."""
    values = torch.cat([SCORES, min(scale, 1) / scale * SCORES.flip(0)]) * scale
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))

    def gradients(dtype, backend):
        leaves = values.to(dtype).requires_grad_(), torch.tensor(0.1, dtype=dtype, requires_grad=True)
        ordered, learned = (
            kernels.soft_sort(leaves[0], t, 20, noise, seed=3, backend=backend) for t in (0.1, leaves[1])
        )
        outer = upstream.to(dtype)
        return *torch.autograd.grad(ordered, leaves[0], outer), *torch.autograd.grad(learned, leaves, outer)

    got, expected = gradients(torch.float32, backend), gradients(torch.float64, "reference")
    for one, exact in zip(got, expected, strict=True):
        for row, exact_row in zip(torch.atleast_2d(one), torch.atleast_2d(exact), strict=True):
            assert (row - exact_row).abs().max() < 1e-3 * exact_row.abs().max()


def test_constant_rows_stay_constant_at_every_scale():
    for value in (0.0, 1e-38, 1.0, 3e38, -3e38):
        values = torch.full((1, 5), value)
        torch.testing.assert_close(kernels.soft_rank(values), torch.full((1, 5), 2.0))
        torch.testing.assert_close(kernels.soft_sort(values), values)


def test_what_float32_does_not_resolve_is_refused_and_float64_has_it():
    score = torch.full((1, 1), 1e5)
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"float32 resolves to .*give float64"):
            kernels.gumbel_sinkhorn(score, 1.0, backend=backend)
    assert kernels.gumbel_sinkhorn(score.double(), 1.0).item() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"scores² or noise, over tau"):
        kernels.gumbel_sinkhorn(SCORES * 1e20, 0.3)

    with pytest.raises(ValueError, match=r"logits reach .*shift rows and columns"):
        kernels.log_sinkhorn(LOGITS * 1e20)
    # a column that nothing else can fill: its potential is as large
    with pytest.raises(ValueError, match="logits reach"):
        kernels.log_sinkhorn(torch.tensor([[[0.0, -1e20], [0.0, -1e20]]]))
    # forbidden entries may be as low as they like
    allowed = torch.eye(4).bool() | torch.eye(4).roll(1, 0).bool()
    p = kernels.log_sinkhorn(torch.where(allowed, LOGITS[:1], -1e20)).exp()
    assert (p[0][~allowed] == 0).all()
    torch.testing.assert_close(p.sum(1), torch.ones(1, 4))


def test_the_largest_scores_accepted_give_finite_masks():
    # just inside what is resolved: columns of P still sum to 1
    for k in (1, 2, 30):
        scores = torch.full((1, k), 11_000.0)
        scores[0, ::2] *= -1
        p = kernels.gumbel_sinkhorn(scores, 1.0)
        assert p.isfinite().all()
        torch.testing.assert_close(p.sum(1), torch.ones(1, k))


def test_vmap_over_nothing():
    one = {
        "rank": lambda s: kernels.soft_rank(s[None])[0],
        "sort": lambda s: kernels.soft_sort(s[None])[0],
        "topk": lambda s: kernels.soft_topk(s[None], 2)[0],
        "masks": lambda s: kernels.soft_topk_masks(s[None], [0.2, 0.5], 0.3)[0],
        "noise": lambda s: kernels.soft_topk_masks(s[None], [0.2, 0.5], 0.3, noise=0.1, seed=1)[0],
        "permutation": lambda s: kernels.gumbel_sinkhorn(s[None], 0.3)[0],
    }
    for f in one.values():
        assert torch.vmap(f)(SCORES[:0]).shape == (0, *f(SCORES[0]).shape)
    assert torch.vmap(lambda t: kernels.gumbel_sinkhorn(SCORES, t))(torch.rand(0)).shape == (0, 3, 16, 16)
    assert torch.vmap(lambda x: kernels.log_sinkhorn(x[None])[0])(LOGITS[:0]).shape == (0, 4, 4)
    inputs = SCORES[:0].clone().requires_grad_()
    assert torch.autograd.grad(torch.vmap(one["rank"])(inputs).sum(), inputs)[0].shape == (0, 16)


IMAGES = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TAPS = kernels.Taps(torch.arange(8)[:, None] // 4, torch.ones(8, 1), 2)
UPSAMPLER = kernels.Upsampler(TAPS, TAPS)
MASKS = torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(0))
RANKS = torch.arange(64).view(1, 8, 8)


def perturb(**changes):
    given = {"images": IMAGES, "references": 1 - IMAGES, "masks": MASKS, "upsampler": UPSAMPLER}
    return kernels.perturb(**given | changes)


def by_rank(ranks=RANKS, counts=(1, 5)):
    return kernels.perturb_by_rank(IMAGES, 1 - IMAGES, ranks, counts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perturb(upsampler=None), "upsampler is a NoneType: give an Upsampler"),
        (lambda: perturb(upsampler=(TAPS, None)), "upsampler is a tuple"),
        (lambda: perturb(mean=0.5), r"mean is a float: give one value per channel, \(3,\)"),
        (lambda: perturb(std=[0.5] * 3), "std is a list"),
        (lambda: perturb(mean=torch.zeros(3) + 0j), "mean is complex64"),
        (lambda: perturb(dtype="float32"), "dtype='float32': give float32"),
        (lambda: perturb(dtype=0), "dtype=0: give float32"),
        (lambda: perturb(images=IMAGES.to_sparse()), "images is sparse_coo float32"),
        (lambda: perturb(masks=MASKS.to("meta")), "masks is float32 .* on meta"),
        (lambda: by_rank(ranks=RANKS > 0), "ranks is bool"),
        (lambda: by_rank(ranks=RANKS + 0j), "ranks is complex64"),
        (lambda: by_rank(ranks=RANKS.to_sparse()), "ranks is sparse_coo int64"),
        (lambda: by_rank(counts="ab"), "counts='ab': give a 1-dim sequence of integers"),
        (lambda: by_rank(counts=None), "counts=None"),
        (lambda: by_rank(counts=[True]), "counts is bool"),
        (lambda: by_rank(counts=[[1]]), "counts is int64"),
    ],
)
def test_wrong_arguments_of_perturbations(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_counts_may_be_numpy_and_none_at_all():
    for ours, expected in zip(by_rank(counts=np.array([1, 5])), by_rank(), strict=True):
        assert torch.equal(ours, expected)
    assert by_rank(counts=[])[0].shape == (1, 0, 3, 8, 8)


@pytest.mark.parametrize(
    ("cell", "weight", "size", "message"),
    [
        (torch.tensor([[0], [2]]), torch.ones(2, 1), 2, "cell spans 0 … 2: cells must lie in 0 … size − 1 = 1"),
        (torch.tensor([[-1], [0]]), torch.ones(2, 1), 2, "cell spans -1 … 0"),
        (torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1), 2, "cell is int32"),
        (torch.zeros(2, dtype=torch.int64), torch.ones(2), 2, r"cell is int64 of shape \(2,\)"),
        ([[0]], torch.ones(1, 1), 1, "cell is a list"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 2), 2, r"weight is float32 of shape \(2, 2\)"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1).half(), 2, "weight is float16"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), torch.nan), 2, "weight holds NaN"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 0, "size=0: give an integer ≥ 1"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 2.0, "size=2.0"),
    ],
)
def test_taps_are_checked_where_they_are_made(cell, weight, size, message):
    with pytest.raises(ValueError, match=message) as caught:
        kernels.Taps(cell, weight, size)
    assert "\n" not in str(caught.value)


def test_taps_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TAPS.size = 1
    with pytest.raises(ValueError, match="cell spans 0 … 1"):
        dataclasses.replace(TAPS, size=1)
    wider = dataclasses.replace(TAPS, size=3)
    torch.testing.assert_close(wider.dense(), torch.nn.functional.pad(TAPS.dense(), (0, 1)))
    for other in (copy.deepcopy(UPSAMPLER), pickle.loads(pickle.dumps(UPSAMPLER)), UPSAMPLER.to("cpu")):
        assert torch.equal(other.rows.dense(), TAPS.dense())


def test_taps_on_the_way_to_a_device_are_not_read_again(monkeypatch):
    monkeypatch.setattr(kernels.Taps, "__post_init__", lambda self: pytest.fail("checked again"))
    assert UPSAMPLER.to("meta").rows.cell.is_meta


class Perturbed(torch.nn.Module):
    def forward(self, masks, upsampler):
        return kernels.perturb(IMAGES, 1 - IMAGES, masks, upsampler)[0]


def test_taps_under_compile_export_and_vmap():
    run = Perturbed()
    expected = run(MASKS, UPSAMPLER)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(MASKS, UPSAMPLER), expected)
    torch.testing.assert_close(torch.export.export(run, (MASKS, UPSAMPLER)).module()(MASKS, UPSAMPLER), expected)

    def made_inside(masks, cell, weight):
        taps = kernels.Taps(cell, weight, 2)
        return run(masks, kernels.Upsampler(taps, taps).to("cpu"))

    inside = torch.compile(made_inside, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inside(MASKS, TAPS.cell, TAPS.weight), expected)
    mapped = torch.vmap(run, in_dims=(0, None))(torch.stack([MASKS, 1 - MASKS]), UPSAMPLER)
    torch.testing.assert_close(mapped[0], expected)


def test_an_upsampler_first_asked_for_in_inference_mode_serves_training():
    regions._cached_taps.cache_clear()
    with torch.inference_mode():
        regions.grid(8, 8, (2, 2)).upsampler()
    upsampler = regions.grid(8, 8, (2, 2)).upsampler()
    assert not any(part.is_inference() for taps in upsampler for part in (taps.cell, taps.weight))
    masks = MASKS.clone().requires_grad_()
    for backend in ("reference", "auto"):
        deleted, _ = perturb(masks=masks, upsampler=upsampler, backend=backend)
        deleted.sum().backward()
    assert masks.grad.abs().max() > 0


def test_numbers_may_change_between_compiled_calls():
    compiled = torch.compile(lambda s, n, tau, k: kernels.soft_topk(s, k, tau, n), fullgraph=True, backend="aot_eager")
    for n, tau, k in ((60, 0.3, 2), (50, 0.2, 3), (40, 0.1, 4)):
        torch.testing.assert_close(compiled(SCORES, n, tau, k).sum(1), torch.full((3,), float(k)), rtol=0, atol=0.02)


def test_infinite_scores_make_their_own_image_nan():
    scores = SCORES.clone()
    scores[1, 3] = torch.inf
    for operator in (lambda x: kernels.soft_topk_masks(x, [0.5], 0.3), kernels.soft_rank):
        out = operator(scores)
        assert out[1].isnan().all()
        torch.testing.assert_close(out[[0, 2]], operator(SCORES[[0, 2]]))
    # finite, yet not their squares
    with pytest.raises(ValueError, match="reach inf"):
        kernels.gumbel_sinkhorn(SCORES.double() * 1e200, 0.3)


def test_weights_of_the_same_fractions_are_made_once():
    functional._kept_weights.cache_clear()
    by_hand = torch.tensor([[1, 0.2, 0], [1, 1, 0.4]])  # 0.4·3 and 0.8·3 ranks
    for fractions in ([0.4, 0.8], torch.tensor([0.4, 0.8], dtype=torch.float64)):
        kept = functional._cumulative_weights(fractions, torch.zeros(2, 3))
        torch.testing.assert_close(kept, by_hand)
    assert functional._kept_weights.cache_info()[:2] == (1, 1)  # hits, misses
    # what decides them: the fractions, as many digits as they have, the number of regions, the type
    rounded = torch.tensor([0.4, 0.8])
    for given, like in (([0.4, 0.9], torch.zeros(1, 3)), (rounded, torch.zeros(1, 3)), ([0.4, 0.8], torch.zeros(1, 4))):
        expected = (torch.as_tensor(given).double()[:, None] * like.shape[1] - torch.arange(like.shape[1])).clamp(0, 1)
        torch.testing.assert_close(functional._cumulative_weights(given, like).double(), expected)
    assert functional._cumulative_weights([0.4, 0.8], torch.zeros(1, 3).double()).dtype == torch.float64
    assert functional._kept_weights.cache_info().misses == 5


def test_kept_weights_serve_every_mode():
    """Made in inference mode, they are good for gradients; fractions that learn get theirs; nothing fake is kept."""
    functional._kept_weights.cache_clear()
    with torch.inference_mode():
        expected = masks(fractions=[0.3, 0.6], backend="reference")
    scores = SCORES.clone().requires_grad_()
    for backend in ("auto", "reference"):
        out = masks(scores=scores, fractions=[0.3, 0.6], backend=backend)
        torch.testing.assert_close(out, expected)
        assert torch.autograd.grad(out.sum(), scores)[0].isfinite().all()
    learnt = torch.tensor([0.3, 0.6], requires_grad=True)
    out = masks(fractions=learnt, backend="reference")
    (gradient,) = torch.autograd.grad(out.sum(), learnt)
    assert (gradient > 0).all()
    before = functional._kept_weights.cache_info()
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        masks(scores=mode.from_tensor(SCORES), fractions=[0.3, 0.6])
    compiled = torch.compile(lambda s: masks(scores=s, fractions=[0.3, 0.6]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(SCORES), expected)
    mapped = torch.vmap(lambda s: masks(scores=s[None], fractions=[0.3, 0.6])[0])(SCORES)
    torch.testing.assert_close(mapped, expected)
    large = kernels.soft_topk_masks(torch.zeros(1, 2**16), torch.tensor([0.3, 0.6]), 0.3, 1)
    assert large.shape == (1, 2, 2**16)
    assert functional._kept_weights.cache_info() == before
