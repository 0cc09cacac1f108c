"""The explorer without a page: what it says of a model is what `run_with_hooks` gives, and nothing of it stays."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions.viz.explorer import engine
from lens_positions.viz.explorer.engine import Explorer
from lens_positions.viz.explorer.state import LARGEST, MOST_CHARACTERS, read_edit, read_state

TEXT = "The cat sat on it."
EDITS = {
    "gap": {"kind": "gap", "layers": [1], "token": 5, "by": 2.5},
    "gap at all layers": {"kind": "gap", "layers": None, "token": 9, "by": -0.75},
    "set": {"kind": "set", "layers": [0, 1], "token": 4, "to": 2.0},
    "mean": {"kind": "mean", "layers": None, "token": 6},
    "like": {"kind": "like", "layers": [0], "token": 6, "text": "A dog", "source": 3},
    "freeze": {"kind": "freeze", "layers": [1], "text": "The dog ran to me."},
    "ablate": {"kind": "ablate", "layers": [0], "to": 3.0},
    "ablate to the mean": {"kind": "ablate", "layers": None, "to": "mean"},
    "ablate to a shuffle": {"kind": "ablate", "layers": [1], "to": "shuffle"},
}
IDLE_ON_STATIC = ("mean", "like", "ablate to the mean", "ablate to a shuffle")
SOURCES = [
    dict(source="static"),
    dict(source="shared"),
    dict(source="per_layer"),
    dict(source="per_layer", gap="after"),
    dict(source="per_layer", per_head=True),
]


@pytest.fixture(params=SOURCES, ids=lambda positions: "-".join(map(str, positions.values())))
def model(request, tiny_model):
    return tiny_model(**request.param)


def by_hand(model, edits):
    """Logits, and the activations that a page shows, by `run_with_cache` with the hooks of the lines of Python."""
    lines = Explorer(model).run({"text": TEXT, "edits": edits})["python"]
    given = {"model": model}
    loaded = [line for line in lines.splitlines() if "from_pretrained" in line]
    assert len(loaded) == 1
    exec(lines.replace(loaded[0], ""), given)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TEXT, fwd_hooks=given["hooks"])
    return given["log_probabilities"], logits, cache


def of_heads(values):
    return values.mean(-1) if values.ndim == 2 else values


@pytest.mark.parametrize("name", EDITS)
def test_what_is_shown_is_what_the_lines_of_python_give(model, name):
    if model.position_config.source == "static" and name in (
        "mean",
        "like",
        "ablate to the mean",
        "ablate to a shuffle",
    ):
        with pytest.raises(lp.PositionsError, match="changes nothing"):
            Explorer(model).run({"text": TEXT, "edits": [EDITS[name]]})
        return
    edits = [EDITS[name]] if name != "like" else [EDITS["gap"], EDITS[name]]
    result = Explorer(model).run({"text": TEXT, "edits": edits, "layer": 1, "head": 2, "pattern": True})
    json.dumps(result, allow_nan=False)
    expected, logits, cache = by_hand(model, edits)
    for candidate in result["next"]["candidates"]:
        assert candidate["after"] == pytest.approx(float(expected[candidate["id"]]), abs=1e-4)
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], model.to_tokens(TEXT)[0, 1:], reduction="none")
    assert result["after"]["losses"][1:] == pytest.approx(losses.tolist(), abs=1e-4)
    for layer in range(2):
        for site in ("increments", "positions"):
            assert result["after"][site][layer] == pytest.approx(
                of_heads(cache[site, layer, "attn"][0]).tolist(), abs=1e-4
            )
    assert result["attention"]["after"]["row"] == pytest.approx(cache["pattern", 1][0, 2, -1].tolist(), abs=1e-4)
    moved = {(head["layer"], head["head"]): head["by"] for head in result["heads"]}
    plain = model.run_with_cache(TEXT)[1]
    for (layer, head), by in moved.items():
        change = (cache["pattern", layer] - plain["pattern", layer])[0, head, -1].abs().sum() / 2
        assert by == pytest.approx(float(change), abs=1e-4)


def test_without_edits_before_is_all_there_is(tiny_model):
    model = tiny_model(source="per_layer")
    result = Explorer(model).run({"text": TEXT})
    assert result["after"] is None
    assert result["attention"]["after"] is None
    assert result["heads"] == result["edits"] == []
    logits = model(TEXT)
    for candidate in result["next"]["candidates"]:
        assert candidate["before"] == candidate["after"]
        assert candidate["after"] == pytest.approx(float(logits[0, -1].log_softmax(-1)[candidate["id"]]), abs=1e-5)
    assert result["text"]["before"]["positions"][1] == pytest.approx(model.positions(TEXT)[1, 0].tolist(), abs=1e-5)


def test_the_token_that_is_looked_at_may_stand_before_the_edit(tiny_model):
    model = tiny_model(source="per_layer")
    result = Explorer(model).run({"text": TEXT, "edits": [EDITS["gap at all layers"]], "token": 3})
    assert all(candidate["before"] == candidate["after"] for candidate in result["next"]["candidates"])
    assert result["heads"] == []
    assert result["after"]["losses"] != result.get("text")["before"]["losses"]


def test_texts_too_long_for_whole_patterns_give_the_same_rows(tiny_model, monkeypatch):
    model = tiny_model(source="per_layer")
    state = {"text": TEXT, "edits": [EDITS["gap"]], "token": 12, "layer": 1, "head": 1}
    short = Explorer(model).run(state)
    monkeypatch.setattr(engine, "MOST_SHOWN", 4)
    long = Explorer(model).run(state | {"pattern": True})
    assert not long["attention"]["whole"]
    assert "pattern" not in long["attention"]["before"]
    for when in ("before", "after"):
        assert long["attention"][when]["row"] == pytest.approx(short["attention"][when]["row"], abs=1e-5)
    assert [head["by"] for head in long["heads"]] == pytest.approx([head["by"] for head in short["heads"]], abs=1e-5)


def test_slopes_are_those_of_one_attribution_pass(tiny_model):
    model = tiny_model(source="per_layer")
    explorer = Explorer(model)
    slopes = explorer.slopes({"text": TEXT})["slopes"]
    expected = lp.causal.attribution(model, TEXT, lp.causal.loss())
    assert torch.allclose(torch.tensor(slopes), expected, atol=1e-6)


def test_nothing_of_an_edit_stays_in_the_model(tiny_model):
    model = tiny_model(source="per_layer")
    with torch.no_grad():
        plain = model(TEXT)
    explorer = Explorer(model)
    for edit in EDITS.values():
        explorer.run({"text": TEXT, "edits": [edit]})
    with torch.no_grad():
        assert torch.equal(model(TEXT), plain)
    assert not any(point.fwd_hooks or point._forward_hooks for point in model.hook_dict.values())


@pytest.mark.slow
def test_tabs_in_threads_get_their_own_answers(tiny_model):
    model = tiny_model(source="per_layer")
    explorer = Explorer(model)
    states = [{"text": TEXT, "edits": [edit]} for edit in EDITS.values()] + [{"text": TEXT}]

    def answer(i):
        return {name: value for name, value in explorer.run(states[i % len(states)]).items() if name != "seconds"}

    alone = [answer(i) for i in range(len(states))]
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(answer, range(200))):
            assert found == alone[i % len(states)]


def test_a_question_that_nobody_waits_for_is_dropped(tiny_model):
    explorer = Explorer(tiny_model())
    assert explorer.run({"text": TEXT}, lambda: True) == {"stale": True}


@pytest.mark.slow
def test_few_texts_are_kept(tiny_model):
    explorer = Explorer(tiny_model())
    for i in range(12):
        explorer.run({"text": f"text {i}", "edits": [{"kind": "gap", "token": 2, "by": 1}]})
    assert len(explorer._baselines) == engine.TEXTS_KEPT


def test_edits_are_said_in_words(tiny_model):
    words = Explorer(tiny_model(source="per_layer")).run({"text": TEXT, "edits": list(EDITS.values())})["edits"]
    assert words[0] == "Layer 1: the gap before “c” (token 5) is 2.5 longer"
    assert words[1] == "All layers: the gap before “s” (token 9) is 0.75 shorter"
    assert words[4] == "Layer 0: the gap before “a” (token 6) becomes the gap before token 3 of “A dog”"
    assert words[5] == "Layer 1: every gap held at what “The dog ran to me.” has there"


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (None, "the state is a NoneType; expected an object"),
        ({}, "the text is a NoneType; expected a text"),
        ({"text": ""}, "the text is empty"),
        ({"text": "\ud800"}, "the text has the lone surrogate"),
        ({"text": "a" * (MOST_CHARACTERS + 1)}, "the text has 20,001 characters; expected at most 20,000"),
        ({"text": "a" * 100}, "the text has 101 tokens"),
        ({"text": TEXT, "path": "/etc/passwd"}, "the state has 'path'"),
        ({"text": TEXT, "edits": {}}, "the state has edits as a dict"),
        ({"text": TEXT, "edits": [{}] * 201}, "the state has 201 edits"),
        ({"text": TEXT, "edits": [{"kind": "exec"}]}, "edit 1 is of kind 'exec'"),
        ({"text": TEXT, "edits": [{"kind": "gap", "token": 3, "by": float("nan")}]}, "by of edit 1 is nan"),
        ({"text": TEXT, "edits": [{"kind": "gap", "token": 3, "by": 10**400}]}, "by of edit 1 is 1000"),
        ({"text": TEXT, "edits": [{"kind": "gap", "token": 3, "by": True}]}, "by of edit 1 is True"),
        ({"text": TEXT, "edits": [{"kind": "gap", "token": 0, "by": 1}]}, "the token of edit 1 is 0"),
        ({"text": TEXT, "edits": [{"kind": "gap", "token": 30, "by": 1}]}, "edit 1 is at token 30; expected tokens"),
        ({"text": TEXT, "edits": [{"kind": "gap", "layers": [7], "token": 3, "by": 1}]}, "edit 1 is at layer 7"),
        ({"text": TEXT, "edits": [{"kind": "gap", "layers": [], "token": 3, "by": 1}]}, "the layers of edit 1 are"),
        ({"text": TEXT, "edits": [{"kind": "ablate", "to": "x"}]}, "to of edit 1 is 'x'"),
        ({"text": TEXT, "edits": [{"kind": "freeze", "text": "other"}]}, "expected equally many"),
        ({"text": TEXT, "edits": [{"kind": "like", "token": 3, "text": "A", "source": 9}]}, "source has token 9"),
        ({"text": TEXT, "token": 99}, "the state looks at token 99"),
        ({"text": TEXT, "head": -1}, "head is -1"),
        ({"text": TEXT, "known": 3}, "another known or pattern"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tiny_model, state, sentence):
    explorer = Explorer(tiny_model(source="per_layer"))
    with pytest.raises(lp.PositionsError) as refused:
        explorer.run(state)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_edit_that_was_read_can_be_written_again():
    for edit in EDITS.values():
        assert read_edit(edit).as_json() == edit
    assert read_edit({"kind": "gap", "token": 1, "by": LARGEST}).by == LARGEST
    assert read_state({"text": "a"}).edits == ()


def test_hostile_text_is_a_string_in_the_lines_of_python(tiny_model):
    model = tiny_model(source="per_layer")
    text = '\'"""\n#\\\'); import os; os.abort()  # 中\u202e'
    lines = Explorer(model).run({"text": text, "edits": [EDITS["gap"]]})["python"]
    given = {"model": model}
    exec("\n".join(line for line in lines.split("\n") if "from_pretrained" not in line), given)
    assert given["text"] == text


def test_a_model_whose_patterns_are_hidden_or_that_has_no_tokenizer(tiny_model, monkeypatch):
    model = tiny_model(source="per_layer")
    explorer = Explorer(model)
    explorer._attends = False
    result = explorer.run({"text": TEXT, "edits": [EDITS["gap"]]})
    assert "attention" not in result
    assert "heads" not in result
    bare = drawn_weights(lp.HookedPositionTransformer.from_transformers(tiny_model().original_model, None))
    with pytest.raises(lp.PositionsError, match="has no tokenizer"):
        Explorer(bare)


def test_a_model_runs_in_as_many_threads_as_it_was_given_and_gives_them_back(tiny_model):
    explorer, before, seen = Explorer(tiny_model(), threads=2), torch.get_num_threads(), []

    def outdated():
        seen.append(torch.get_num_threads())
        return False

    explorer.run({"text": TEXT}, outdated)
    explorer.slopes({"text": TEXT}, outdated)
    with pytest.raises(lp.PositionsError, match="looks at token 99"):
        explorer.run({"text": TEXT, "token": 99}, outdated)
    assert seen == [2, 2, 2]
    assert torch.get_num_threads() == before == 1
