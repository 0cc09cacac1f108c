"""Increments replaced by each token's own mean: what a layer knows beyond the identity of a token."""

import pytest
import torch

import lens_positions as lp
from lens_positions import causal

TEXTS = ["The cat sat on a mat.", "Another text, with another end"]


@pytest.mark.parametrize("per_head", [False, True])
def test_the_mean_of_a_token_is_that_of_its_occurrences(tiny_model, per_head):
    model = tiny_model(source="per_layer", per_head=per_head)
    means = causal.token_means(model, TEXTS)
    rows = [torch.tensor([256, *text.encode(), 256]) for text in TEXTS]
    increments = [model.increments(row)[1, 0, 1:].double() for row in rows]
    ids, values = torch.cat([row[1:] for row in rows]), torch.cat(increments)
    torch.testing.assert_close(means[1, ord("t")].double(), values[ids == ord("t")].mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(means[1, ord("~")].double(), values.mean(0), rtol=1e-5, atol=0)  # in neither text
    assert means.shape == ((2, 257, 4) if per_head else (2, 257))


def test_a_source_that_knows_the_token_alone_loses_nothing(tiny_model):
    model = tiny_model(source="shared")
    loss = causal.ablation_table(model, TEXTS, to=["mean"], means=causal.token_means(model, TEXTS)).loss
    of = loss.set_index(["layer", "to"])["change"]
    assert of["all", "token"] == pytest.approx(0, abs=3e-6)
    assert abs(of["all", "mean"]) > 1e-3


@pytest.mark.parametrize("per_head", [False, True])
def test_the_change_is_that_of_the_means_put_in_by_hand(tiny_model, per_head):
    model = tiny_model(source="per_layer", per_head=per_head)
    means = causal.token_means(model, [TEXTS[1]])
    loss = causal.ablation_table(model, TEXTS[0], to=["token"], layers=[1], means=means).loss
    row = loss[loss["layer"] == 1].iloc[0]
    tokens = torch.tensor([[256, *TEXTS[0].encode(), 256]])

    def put_in(increments, hook):
        return means[1][tokens].to(increments)

    nats = []
    for hooks in ([("blocks.1.attn.hook_increments", put_in)], []):
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        nats.append(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).detach())
    assert row["change"] == pytest.approx(float(nats[0] - nats[1]), abs=3e-6)
    assert row["change"] != 0


def test_token_means_are_asked_for_and_of_the_model(tiny_model):
    model = tiny_model()
    with pytest.raises(lp.PositionsError, match='to has "token" and no means'):
        causal.ablation_table(model, TEXTS, to=["token"])
    with pytest.raises(lp.PositionsError, match=r"expected \(2, 257\), \[layer, vocab\]"):
        causal.ablation_table(model, TEXTS, means=torch.ones(3, 257))
