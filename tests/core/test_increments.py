"""Increment sources: what a fresh one gives, what bounds it, what is refused."""

import copy
import itertools

import jaxtyping
import pytest
import torch

import lens_positions as lp
from lens_positions.core.increments import LearnedIncrements, build_sources
from lens_positions.core.visible_tokens import Line

SIZES = {"n_layers": 3, "d_model": 16, "n_heads": 4, "vocab": 11}
ACTIVATIONS = ("sigmoid", "softplus", "none")


def sources_of(dtype=torch.float32, table=None, **config):
    return build_sources(lp.PositionConfig(**config), **SIZES, dtype=dtype, table=table)


def reads_of(source, dtype=torch.float32):
    return torch.randint(0, 11, (2, 5)) if source == "frozen" else 100 * torch.randn(2, 5, 16).to(dtype)


def test_shapes_are_checked_in_the_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        Line(0, 3, "before", torch.ones(3), torch.empty(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("source", ["shared", "per_layer", "frozen"])
def test_fresh_source_gives_exactly_one(source, activation, per_head, dtype):
    for module in sources_of(dtype, source=source, activation=activation, per_head=per_head, max_increment=7.3):
        increments = module(reads_of(source, dtype))
        assert increments.dtype == dtype
        assert increments.shape == ((2, 5, 4) if per_head else (2, 5))
        assert (increments == 1).all()


@pytest.mark.parametrize("max_increment", [1.0000001, 1.5, 10, 1e30])
def test_fresh_sigmoid_gives_exactly_one_whatever_its_bound(max_increment):
    (module,) = sources_of(source="shared", max_increment=max_increment)
    assert (module(reads_of("shared")) == 1).all()


@pytest.mark.parametrize(("source", "per_head"), itertools.product(["shared", "per_layer", "frozen"], [False, True]))
def test_fresh_source_gives_exactly_one_after_the_base_moves_to_bfloat16(tiny_llama, source, per_head):
    model = tiny_llama()
    streams = lp.attach_positions(model, lp.PositionConfig(source=source, per_head=per_head))
    model.to(torch.bfloat16)
    with streams.record() as recorded, torch.no_grad():
        model(torch.randint(0, 61, (2, 7)))
    assert {t.dtype for t in recorded} == {torch.float32}
    assert all((t == 1).all() for t in recorded)


def test_one_source_a_layer_where_per_layer_and_one_for_all_where_shared():
    assert [len(sources_of(source=s)) for s in ("static", "shared", "per_layer", "frozen")] == [0, 1, 3, 1]


def test_activations_bound_increments():
    extremes = torch.tensor([-1e6, -50, -1, 0, 1, 50, 1e6])
    expected = {"sigmoid": (0, 10), "softplus": (0, 1e6 + 1), "none": (-1e6, 1e6 + 1)}
    for activation, (least, most) in expected.items():
        (module,) = sources_of(source="shared", activation=activation)
        module.requires_grad_(False)
        for x in extremes:
            module.out.bias.fill_(x)
            increments = module(reads_of("shared"))
            assert torch.isfinite(increments).all()
            assert (increments >= least).all()
            assert (increments <= most * (1 + 1e-6)).all()
        assert increments.max() == pytest.approx(most, rel=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_reach_every_weight_once_the_last_layer_is_not_zero(activation):
    (module, *_) = sources_of(source="per_layer", activation=activation, per_head=True)
    torch.nn.init.normal_(module.out.weight)
    module(torch.randn(2, 5, 16)).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fresh_source_can_start_to_learn(activation):
    (module, *_) = sources_of(source="per_layer", activation=activation)
    module(torch.randn(2, 5, 16)).sum().backward()
    assert module.out.weight.grad.abs().max() > 0


def test_source_runs_in_its_own_precision_on_bfloat16_states():
    (module, *_) = sources_of(source="per_layer")
    assert module(torch.randn(2, 5, 16, dtype=torch.bfloat16)).dtype == torch.float32


def test_per_layer_source_does_not_depend_on_the_scale_of_the_residual_stream():
    (module, *_) = sources_of(source="per_layer")
    torch.nn.init.normal_(module.out.weight)
    states = torch.randn(2, 5, 16)
    assert torch.allclose(module(states), module(1000 * states), atol=1e-5)


def test_frozen_source_looks_increments_up_and_does_not_train():
    table = torch.rand(11, 4)
    (module,) = sources_of(source="frozen", per_head=True, table=table)
    tokens = torch.tensor([[3, 0, 10]])
    assert torch.equal(module(tokens), table[tokens])
    assert not list(module.parameters())
    table.fill_(9)
    assert (module(tokens) < 9).all()


def test_hidden_sets_the_width_and_defaults_to_a_quarter():
    assert isinstance(sources_of(source="shared", hidden=5)[0], LearnedIncrements)
    assert sources_of(source="shared", hidden=5)[0].hidden.out_features == 5
    assert sources_of(source="shared")[0].hidden.out_features == 4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "learned"},
        {"source": None},
        {"gap": "between"},
        {"activation": "relu"},
        {"per_head": "yes"},
        {"per_head": 1},
        {"max_increment": 1},
        {"max_increment": -3.0},
        {"max_increment": float("nan")},
        {"max_increment": float("inf")},
        {"max_increment": "ten"},
        {"max_increment": None},
        {"hidden": 0},
        {"hidden": -4},
        {"hidden": 2.5},
        {"hidden": "wide"},
    ],
)
def test_config_refuses_with_the_field_and_its_value(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(lp.PositionsError, match=name) as refusal:
        lp.PositionConfig(**wrong)
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("table", "config", "words"),
    [
        (torch.ones(10), {"source": "frozen"}, r"\(10,\).*\(11,\)"),
        (torch.ones(11, 4), {"source": "frozen"}, r"\(11, 4\).*\(11,\)"),
        (torch.ones(11), {"source": "frozen", "per_head": True}, r"\(11,\).*\(11, 4\)"),
        (torch.full((11,), float("nan")), {"source": "frozen"}, "NaN"),
        (torch.tensor([1.0] * 10 + [float("inf")]), {"source": "frozen"}, "NaN or infinite"),
        (torch.ones(11), {"source": "shared"}, "'shared'.*frozen"),
        (torch.ones(11), {"source": "static"}, "'static'.*frozen"),
    ],
)
def test_table_refused(table, config, words):
    with pytest.raises(lp.PositionsError, match=words):
        sources_of(table=table, **config)


def test_copied_sources_are_independent():
    (module,) = sources_of(source="shared")
    twin = copy.deepcopy(module)
    torch.nn.init.ones_(twin.out.bias)
    assert (module(reads_of("shared")) == 1).all()
