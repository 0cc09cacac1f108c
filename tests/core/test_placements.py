"""Models in several places: exact, or refused in one sentence. docs/placements.md has every family."""

import itertools

import pytest
import torch
from placements import LATER, PLACEMENTS, SOURCES, TOKENS, build, difference
from torch import nn

import lens_positions as lp

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_a_model_in_several_places_gives_the_same_to_the_bit(family, placement):
    for source, first in itertools.product(SOURCES, (False, True)):
        if first and placement not in LATER:
            continue
        assert difference(family, placement, source, attach_first=first) == 0.0, (source, first)


def test_weights_that_are_nowhere_are_refused():
    with torch.device("meta"):
        model = build("Llama")
    with pytest.raises(lp.PositionsError, match="on the meta device, without values"):
        lp.attach_positions(model, lp.PositionConfig("shared"))
    assert not hasattr(model, "position_streams")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_streams_on_dynamically_quantised_weights_begin_as_the_model(source):
    model = torch.ao.quantization.quantize_dynamic(build("Llama"), {nn.Linear}, dtype=torch.qint8)
    name, *per_head = source.split(", ")
    with torch.no_grad():
        plain = model(TOKENS).logits
        streams = lp.attach_positions(model, lp.PositionConfig(name, per_head=bool(per_head)))
        off = (model(TOKENS).logits - plain).abs().max()
        # The heads' own rotation rounds in another order, and o_proj then quantises what it reads.
        assert off == 0.0 if not per_head else off < 0.02 * plain.abs().max()
        streams.detach()
        assert torch.equal(model(TOKENS).logits, plain)
