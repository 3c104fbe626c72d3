"""Delta transcoders: the loss is the plain formula, replicas train as if alone, a planted change is found."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.plain_delta import PlainDelta, Step, train_plainly
from sites import MLP, Site
from trainers.activations import Pairs
from trainers.checkpoints import Keeper
from trainers.delta_data import DeltaData, output_variance, residual_of, validate
from trainers.delta_stack import start_of
from trainers.delta_transcoder import DeltaSettings, train_delta, train_deltas
from trainers.errors import DivergedError
from trainers.stacked_deltas import BANDWIDTH, StackedDeltas, Start

D_MODEL = 12
OTHER = Site(3, replace(MLP, reads="a", writes=("b",)))
SETTINGS = DeltaSettings(d_new=8, lr=1e-2, sparsity=1e-4, epochs=8, batch_size=128, l0_budget=3.0, seed=1, patience=99)


@pytest.fixture(scope="module")
def base(random_transcoder):
    return random_transcoder(D_MODEL, 32, layer=3, seed=0)


@pytest.fixture(scope="module")
def planted(base):
    """(train pairs of x and y, validation pairs, DeltaData): y is the base's output and three sparse features more."""
    weights = torch.Generator().manual_seed(0)
    directions = torch.randn(D_MODEL, 3, generator=weights)
    directions /= directions.norm(dim=0)
    outputs = 2 * torch.randn(3, D_MODEL, generator=weights)

    def pairs(tokens: int, seed: int) -> Pairs:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, D_MODEL, generator=generator).bfloat16()
        change = torch.relu(x.float() @ directions - 0.8) @ outputs
        noise = 0.2 * torch.randn(tokens, D_MODEL, generator=generator)
        return Pairs(list(zip(x.tensor_split(3), (base(x.float()) + change + noise).tensor_split(3), strict=True)))

    return residuals(pairs(2000, 1), pairs(700, 2), base)


def residuals(train: Pairs, validation: Pairs, base) -> DeltaData:
    made = [Pairs([(x, residual_of(base, x, y)) for x, y in split.shards]) for split in (train, validation)]
    variance = output_variance(validation)
    error = sum(residual.pow(2).sum().item() for _, residual in made[1].shards)
    return DeltaData(*made, variance, error / (validation.tokens * D_MODEL * variance), Site(3))


def settings(**changed) -> DeltaSettings:
    return DeltaSettings(**{**vars(SETTINGS), **changed})


@pytest.fixture(scope="module")
def trained(planted):
    return train_delta(planted, SETTINGS)


def test_the_residual_is_what_the_base_misses(base):
    x = torch.randn(10, D_MODEL, generator=torch.Generator().manual_seed(0))
    y = torch.randn(10, D_MODEL, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(residual_of(base, x, y, batch_size=3), y - base(x))
    assert residual_of(base, x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_a_planted_change_is_found(trained, planted):
    figures = trained.figures
    assert figures["val_fvu_base"] == planted.alone
    assert figures["val_fvu"] < 0.3 * figures["val_fvu_base"]
    assert 0.3 < figures["val_cos"] <= 1, "most tokens have nothing but noise to explain"
    assert 0 < figures["val_l0_delta"] < SETTINGS.l0_budget


def test_the_delta_has_no_bias_and_knows_its_place(planted):
    (delta,) = train_delta(planted._replace(site=OTHER), settings(epochs=1)).deltas
    assert (delta.b_dec, delta.site, delta.d_sae) == (None, OTHER, 8)
    assert (delta.threshold > 0).all()


def test_before_training_the_delta_is_exactly_nothing(planted):
    """A step of learning rate zero leaves the decoder where it starts."""
    trained = train_delta(planted, settings(lr=0.0, epochs=1))
    (delta,) = trained.deltas
    x = planted.validation.whole()[0].float()
    assert (delta.encode(x) > 0).any(), "features are active, and yet"
    assert torch.equal(delta(x), torch.zeros_like(x))
    assert trained.figures["val_fvu"] == pytest.approx(planted.alone, rel=1e-6)


def test_features_start_at_the_l0_budget(planted):
    (delta,) = train_delta(planted, settings(lr=0.0, epochs=1, l0_budget=2.0)).deltas
    x = planted.train.whole()[0].float()
    assert (delta.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("zero_decoder", [False, True])
def test_feature_space_losses_and_gradients_are_the_plain_ones(zero_decoder):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(64, D_MODEL, generator=generator) for _ in range(2))
    # Set up on other tokens: a threshold that is one of these very pre-activations would be a tie that rounding breaks.
    other = torch.randn(64, D_MODEL, generator=generator)
    model = StackedDeltas(Start(other, torch.randn_like(other)), replicas=3, d_new=5, l0_budget=2.0, seed=0)
    if not zero_decoder:
        model.W_dec.normal_(generator=generator)
        model.b_enc.normal_(generator=generator).mul_(0.1)
    found = model.backward(x, 2 * residual, sparsity=0.3, deviation=2.0)
    gradients = model.gradients()
    for index in range(3):
        plain = PlainDelta(model, index)
        error, penalty = plain.losses(x, residual)
        (error + 0.3 * penalty).backward()
        assert (found.error[index] + residual.pow(2).mean()).item() == pytest.approx(error.item(), rel=1e-5)
        assert found.penalty[index].item() == pytest.approx(penalty.item(), rel=1e-5)
        for one, parameter in zip(gradients, plain.parameters(), strict=True):
            torch.testing.assert_close(one[index], parameter.grad, rtol=1e-4, atol=1e-5)
        assert gradients[3][index].abs().max() > 0, "the decoder learns, from zero too"
        assert gradients[2][index].abs().max() > 0 or zero_decoder, "and so do the thresholds"


def test_the_loss_curve_is_that_of_the_plain_trainer(base, planted):
    """Step for step, from the same start on the same batches: method.md section 3 as the usual script writes it."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1000, D_MODEL, generator=generator)
    y = base(x) + torch.relu(x @ torch.randn(D_MODEL, D_MODEL, generator=generator) - 2)
    data = planted._replace(train=Pairs([(x, residual_of(base, x, y))]))
    chosen = settings(batch_size=50, epochs=1, sparsity=1e-2, threshold="learned")
    found: list[float] = []
    size = data.train.shards[0][1].pow(2).sum(1) / D_MODEL / planted.unit
    batches = Pairs([(size,)]).batches(50, torch.Generator().manual_seed(0))
    sparsity = [1e-2 * min(1, (step + 1) / 4) for step in range(20)]

    def note(losses):
        weight = sparsity[len(found)]
        found.append((losses.error + weight * losses.penalty).item() + next(batches)[0].mean().item())

    train_delta(data, chosen, on_step=note)
    curve = train_plainly(base, x, y, planted.unit, chosen)
    assert len(found) == len(curve.losses) == 20
    assert found == pytest.approx(curve.losses, rel=1e-4)
    assert found[-1] < 0.9 * found[0]


def test_the_straight_through_gradient_of_the_threshold():
    """Rectangle kernel: -threshold / bandwidth within half a bandwidth of the threshold, and nothing outside it."""
    threshold = torch.tensor([0.5], requires_grad=True)
    offsets = torch.tensor([-0.6, -0.4, 0.0, 0.4, 0.6]).unsqueeze(1) * BANDWIDTH
    pre = (0.5 + offsets).clone().requires_grad_()
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).unsqueeze(1)
    output = Step.apply(pre, threshold)
    output.backward(upstream)
    assert threshold.grad.item() == pytest.approx(-0.5 / BANDWIDTH * (2 + 4 + 8))
    assert pre.grad.flatten().tolist() == [0, 0, 0, 8, 16], "the input's gradient passes where the feature is on"
    assert output.flatten().tolist() == pytest.approx([0, 0, 0, 0.54, 0.56])


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_ends_as_if_it_had_not_been(planted, tmp_path, after):
    """Killed after its nth validation, with a checkpoint of the one before or of that very one."""
    chosen = settings(epochs=6, replicas=2)
    whole = []
    expected = train_delta(planted, chosen, report=whole.append)
    first = []

    def report(figures):
        first.append(figures)
        if len(first) == after:
            raise Killed

    keeper = Keeper(tmp_path / "run" / "checkpoint.safetensors", seconds=0)
    with pytest.raises(Killed):
        train_delta(planted, chosen, report=report, keeper=keeper)
    assert keeper.path.exists() == (after > 1)
    again, steps = [], []
    found = train_delta(planted, chosen, report=again.append, on_step=steps.append, keeper=keeper)
    assert again == whole, "it reports again what it had reported"
    assert len(steps) == 15 * (6 - (after - 1)), "and does only what is left"
    assert found.figures == expected.figures
    for one, other in zip(found.deltas, expected.deltas, strict=True):
        for name in ("W_enc", "b_enc", "threshold", "W_dec"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_checkpoint_of_another_run_or_a_torn_one_is_not_used(planted, tmp_path):
    keeper = Keeper(tmp_path / "checkpoint.safetensors", seconds=0)
    train_delta(planted, settings(epochs=2), keeper=keeper)
    steps = []
    train_delta(planted, settings(epochs=2, lr=2e-2), on_step=steps.append, keeper=keeper)
    assert len(steps) == 30
    keeper.path.write_bytes(keeper.path.read_bytes()[:100])
    train_delta(planted, settings(epochs=2, lr=2e-2), on_step=steps.append, keeper=keeper)
    assert len(steps) == 60


def test_thresholds_are_trained(planted):
    lasting = train_delta(planted, SETTINGS).deltas[0].threshold
    start = train_delta(planted, settings(lr=0.0, epochs=1)).deltas[0].threshold
    assert (lasting - start).abs().max() > 0.05


def test_a_replica_trains_as_it_would_alone(planted):
    """Replica i of seed s is seed s + i alone: same start, same batches, its own clipping."""
    together, alone = [], {}
    # A limit that always bites, and a decoder that grows: were gradients clipped together, replicas would differ.
    train_delta(planted, settings(replicas=3, grad_clip=0.02), report=together.append)
    for seed in (1, 2, 3):
        alone[seed] = []
        train_delta(planted, settings(seed=seed, grad_clip=0.02), report=alone[seed].append)
    assert len(together) == 8
    for step, figures in enumerate(together):
        apart = [alone[seed][step] for seed in (1, 2, 3)]
        assert figures["val_fvu_replicas"] == pytest.approx([one["val_fvu"] for one in apart], rel=1e-4)
        assert figures["val_l0_delta_replicas"] == pytest.approx([one["val_l0_delta"] for one in apart], rel=1e-2)
        assert figures["val_fvu"] == pytest.approx(sum(one["val_fvu"] for one in apart) / 3, rel=1e-4)
    assert len({round(one, 6) for one in together[-1]["val_fvu_replicas"]}) == 3, "seeds differ"


SIDE_BY_SIDE = (
    {"lr": 1e-2, "sparsity": 1e-4},
    {"lr": 1e30, "sparsity": 1e-4},
    {"lr": 3e-3, "sparsity": 1e-2},
    {"lr": 1e-12, "sparsity": 1e-3},
)
"""Of which the second diverges and the last has no patience left before the others end."""


@pytest.mark.parametrize("threshold", ["calibrated", "learned"])
def test_runs_side_by_side_train_as_they_would_alone(planted, threshold):
    asked = [settings(replicas=2, patience=3, grad_clip=1e9, threshold=threshold, **one) for one in SIDE_BY_SIDE]
    reports = [[] for _ in asked]
    found = train_deltas(planted, asked, report=lambda run, figures: reports[run].append(figures))
    assert [isinstance(one, DivergedError) for one in found] == [False, True, False, False]
    for one, together, seen in zip(asked, found, reports, strict=True):
        alone = []
        (lone,) = train_deltas(planted, [one], report=lambda _, figures, alone=alone: alone.append(figures))
        assert [figures["step"] for figures in seen] == [figures["step"] for figures in alone]
        for mine, other in zip(seen, alone, strict=True):
            for name in ("val_fvu_replicas", "val_l0_delta_replicas", "val_loss"):
                assert mine[name] == pytest.approx(other[name], rel=1e-4)
        if isinstance(lone, DivergedError):
            assert str(together) == str(lone)
            continue
        assert together.figures["step"] == lone.figures["step"]
        for delta, other in zip(together.deltas, lone.deltas, strict=True):
            torch.testing.assert_close(delta.W_dec, other.W_dec, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(delta.W_enc, other.W_enc, rtol=1e-3, atol=1e-5)
    assert len(reports[3]) < len(reports[0])


def test_interrupted_runs_side_by_side_end_as_if_they_had_not_been(planted, tmp_path):
    asked = [settings(epochs=6, patience=3, **one) for one in SIDE_BY_SIDE]
    whole, first, again, steps = [], [], [], []
    expected = train_deltas(planted, asked, report=lambda *one: whole.append(one))

    def report(*one):
        first.append(one)
        if len(first) == 12:
            raise Killed

    keeper = Keeper(tmp_path / "checkpoint.safetensors", seconds=0)
    with pytest.raises(Killed):
        train_deltas(planted, asked, report=report, keeper=keeper)
    found = train_deltas(planted, asked, report=lambda *one: again.append(one), on_step=steps.append, keeper=keeper)
    assert len(steps) < 15 * 6
    assert sorted(again, key=lambda one: one[0]) == sorted(whole, key=lambda one: one[0])
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, DivergedError):
            assert str(one) == str(other)
        else:
            assert one.figures == other.figures
            assert torch.equal(one.deltas[0].W_enc, other.deltas[0].W_enc)


def test_runs_side_by_side_may_differ_in_two_settings_alone(planted):
    with pytest.raises(ValueError, match="lr and sparsity alone"):
        train_deltas(planted, [settings(), settings(l0_budget=2.0)])


def test_figures_are_those_of_the_deltas_that_are_returned(planted):
    trained = train_delta(planted, settings(replicas=2, epochs=3))
    x, residual = planted.validation.whole()
    losses = []
    for index, delta in enumerate(trained.deltas):
        acts = delta.encode(x.float())
        error = (acts @ delta.W_dec - residual).pow(2).mean().item() / planted.unit
        l0 = (acts > 0).sum(1).float().mean().item()
        losses.append(error + max(0.0, l0 / SETTINGS.l0_budget - 1))
        assert trained.figures["val_fvu_replicas"][index] == pytest.approx(error, rel=1e-4)
        assert trained.figures["val_l0_delta_replicas"][index] == pytest.approx(l0, rel=1e-5)
        assert trained.figures["val_loss_replicas"][index] == pytest.approx(losses[-1], rel=1e-4)
    assert trained.figures["val_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_validation_figures_are_the_plain_ones_to_the_last_digit(trained, planted):
    x, residual = planted.validation.whole()
    figures = validate(trained.deltas, planted._replace(validation=Pairs([(x, residual)])), SETTINGS.l0_budget)
    (delta,) = trained.deltas
    acts = delta.encode(x.float())
    output = acts @ delta.W_dec
    missed, fired = output - residual, acts > 0
    assert figures["val_fvu"] == missed.pow(2).sum(dtype=torch.float64).item() / (residual.numel() * planted.unit)
    assert figures["val_l0_delta"] == fired.sum().item() / len(x)
    assert figures["dead_fraction"] == 1.0 - fired.any(0).float().mean().item()
    assert figures["val_cos"] == torch.cosine_similarity(output, residual, dim=1).sum().item() / len(x)
    assert figures["val_l2_ratio"] == (missed.norm(dim=1) / residual.norm(dim=1)).sum().item() / len(x)


def test_above_the_l0_budget_the_loss_is_penalised(trained, planted):
    within, above = (validate(trained.deltas, planted, budget) for budget in (100.0, 0.1))
    assert within["val_loss"] == within["val_fvu"]
    assert above["val_loss"] == pytest.approx(above["val_fvu"] + above["val_l0_delta"] / 0.1 - 1)


def test_sparsity_lowers_the_l0_of_learned_thresholds(planted):
    dense, sparse = (train_delta(planted, settings(sparsity=s, threshold="learned")).figures for s in (0.0, 0.3))
    assert sparse["val_l0_delta"] < 0.7 * dense["val_l0_delta"]
    assert sparse["val_fvu"] > dense["val_fvu"]


@pytest.mark.parametrize("budget", [1.0, 3.0])
def test_calibrated_thresholds_spend_the_budget(planted, budget):
    figures = train_delta(planted, settings(l0_budget=budget, replicas=2)).figures
    for l0 in figures["val_l0_delta_replicas"]:
        assert l0 == pytest.approx(0.95 * budget, rel=0.2)


def test_features_start_where_the_residual_can_be_predicted(planted):
    """The planted change reads one direction: the columns lean towards it, unless nothing changed."""
    x, residual = (column.float() for column in planted.train.whole())
    sizes = {"replicas": 1, "d_new": 8, "l0_budget": 2.0, "seed": 0}
    regression = torch.linalg.lstsq(x - x.mean(0), residual - residual.mean(0)).solution
    readable = torch.linalg.svd(regression).U[:, 0]
    found = StackedDeltas(Start(x, residual), **sizes)
    nothing = StackedDeltas(Start(x, torch.zeros_like(residual)), **sizes)
    assert (readable @ found.W_enc).abs().mean() > 2 * (readable @ nothing.W_enc).abs().mean()
    assert torch.allclose(nothing.W_enc.norm(dim=0), torch.ones(8))
    assert found.W_enc.is_contiguous(), "as the fused optimiser needs it"


def test_deltas_that_start_from_the_same_pairs_start_as_they_would_alone(planted):
    """What they start from is kept; training one changes nothing for the next."""
    sizes = {"replicas": 2, "l0_budget": 2.0, "seed": 3}
    kept = start_of(planted.train, "cpu")
    assert start_of(planted.train, "cpu") is kept
    for d_new in (4, 8, 4, 8):
        found = StackedDeltas(kept, d_new=d_new, **sizes)
        alone = StackedDeltas(start_of(Pairs(planted.train.shards), "cpu"), d_new=d_new, **sizes)
        for name, tensor in found.tensors().items():
            assert torch.equal(tensor, alone.tensors()[name])
            tensor.add_(1.0)


def test_the_scale_of_a_layer_does_not_matter(planted, trained):
    """Everything 1000 times larger is the same problem: lr and sparsity mean the same on every layer."""
    scaled = [Pairs([(x, 1000 * residual) for x, residual in split.shards]) for split in planted[:2]]
    large = train_delta(DeltaData(*scaled, 1e6 * planted.unit, planted.alone, planted.site), SETTINGS)
    assert large.figures["val_fvu"] == pytest.approx(trained.figures["val_fvu"], rel=1e-3)
    torch.testing.assert_close(large.deltas[0].W_dec, 1000 * trained.deltas[0].W_dec, rtol=1e-2, atol=1.0)


def test_training_stops_when_nothing_improves(planted):
    seen = []
    best = train_delta(planted, settings(lr=1e-12, patience=2, epochs=50), report=seen.append)
    assert len(seen) <= 6
    assert best.figures == min(seen, key=lambda figures: figures["val_loss"])


def test_the_best_validation_is_returned_not_the_last(planted):
    seen = []
    best = train_delta(planted, settings(lr=0.1, epochs=12), report=seen.append)
    assert best.figures["val_loss"] == min(figures["val_loss"] for figures in seen)
    assert validate(best.deltas, planted, SETTINGS.l0_budget)["val_loss"] == best.figures["val_loss"]


def test_reports_count_steps_and_tokens(planted):
    seen = []
    train_delta(planted, settings(epochs=2, evals_per_epoch=3), report=seen.append)
    assert [figures["step"] for figures in seen] == [5, 10, 15, 20, 25, 30], "15 full batches in 2000 tokens"
    assert [figures["tokens"] for figures in seen] == [128 * figures["step"] for figures in seen]


def test_a_loss_that_is_not_finite_ends_the_run(planted):
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) by step \d+ \(lr 1e\+30\)"):
        train_delta(planted, settings(lr=1e30, grad_clip=1e9))


def test_a_delta_far_worse_than_the_base_alone_ends_the_run(planted):
    good_base = planted._replace(alone=0.001)  # whatever a first epoch learns on this data leaves more than 0.01
    with pytest.raises(DivergedError, match=r"val_fvu is 0\.\d+ at step 15, against 0\.001 without a delta"):
        train_delta(good_base, SETTINGS)


def test_a_nan_in_the_data_ends_the_run(planted):
    x, residual = planted.train.whole()
    residual = residual.clone().index_fill_(0, torch.tensor([3]), math.nan)
    with pytest.raises(DivergedError, match="the loss is nan"):
        train_delta(planted._replace(train=Pairs([(x, residual)])), SETTINGS)


def test_bf16_comes_close(planted, trained):
    half = train_delta(planted, settings(precision="bf16"))
    assert half.deltas[0].W_dec.dtype == torch.float32
    assert half.figures["val_fvu"] == pytest.approx(trained.figures["val_fvu"], rel=0.15)


def test_weight_decay_shrinks_the_weights(planted, trained):
    decayed = train_delta(planted, settings(weight_decay=1.0))
    assert decayed.deltas[0].W_dec.norm() < trained.deltas[0].W_dec.norm()


def test_a_site_may_write_another_width_than_it_reads():
    """As the queries, keys and values of attention do, or its output where heads are narrow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, D_MODEL, generator=generator)
    for d_out in (D_MODEL // 2, 2 * D_MODEL):
        y = torch.relu(x @ torch.randn(D_MODEL, 4, generator=generator) - 1) @ torch.randn(
            4, d_out, generator=generator
        )
        train, validation = (Pairs([(x[part], y[part])]) for part in (slice(0, 2500), slice(2500, None)))
        data = DeltaData(train, validation, y.pow(2).mean().item(), 1.0, OTHER, "change")
        done = train_delta(data, settings(epochs=4))
        assert all((delta.d_in, delta.d_out) == (D_MODEL, d_out) for delta in done.deltas)
        left = torch.stack([delta(x[2500:]) - y[2500:] for delta in done.deltas]).pow(2).mean().item()
        assert done.figures["val_unexplained"] == pytest.approx(left / data.unit, rel=1e-3)
        assert done.figures["val_unexplained"] < 0.6
